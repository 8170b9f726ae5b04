"""Run a chapter's laws on a module, and say each as a sentence.

A chapter is a folder chNN_name with

    start.py      what the learner copies: signatures, docstrings, empty bodies
    solution.py   the plainest code that works
    laws.py       TITLE, PROVIDES (the names a module must define), functions law_*(m) and MUTANTS

A law takes the loaded module and asserts one thing; its docstring is the sentence that is shown, and the message of
its assertion tells what was seen and where to look. A mutant is a known mistake, made in solution.py by replacing a
text: the law that it names must fail on it.
"""

import ast
import importlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 120
"""Seconds after which a grade is given up: an endless loop must not hang the terminal."""


@dataclass(frozen=True)
class Mutant:
    """A known mistake: `new` in place of `old` in solution.py, and the law that must name it."""

    what: str
    old: str
    new: str
    law: str
    """The name of the function in laws.py without `law_`."""


@dataclass(frozen=True)
class Chapter:
    """A folder of the course."""

    number: int
    folder: Path

    @property
    def name(self) -> str:
        """The noun after the number: ch05_engine -> engine."""
        return self.folder.name.partition("_")[2]

    @property
    def mine(self) -> Path:
        """The learner's own file, relative to the folder in which they work."""
        return Path("my") / f"{self.name}.py"

    @property
    def laws_module(self) -> ModuleType:
        return importlib.import_module(f"course.{self.folder.name}.laws")

    @property
    def title(self) -> str:
        return self.laws_module.TITLE

    @property
    def provides(self) -> tuple[str, ...]:
        """Names that a module of this chapter must define."""
        return self.laws_module.PROVIDES

    @property
    def mutants(self) -> list[Mutant]:
        return self.laws_module.MUTANTS

    @property
    def laws(self) -> dict[str, Callable[[Any], None]]:
        """The laws by name, in the order of the file."""
        found = vars(self.laws_module).items()
        return {name.removeprefix("law_"): law for name, law in found if name.startswith("law_")}


def chapters() -> list[Chapter]:
    """All chapters in order."""
    folders = sorted(ROOT.glob("course/ch[0-9][0-9]_*"))
    return [Chapter(int(folder.name[2:4]), folder) for folder in folders if (folder / "laws.py").is_file()]


def find_chapter(number: int) -> Chapter:
    """Return the chapter of a number; ValueError lists those there are."""
    for chapter in chapters():
        if chapter.number == number:
            return chapter
    raise ValueError(f"CHALLENGE={number}: choose one of {', '.join(str(each.number) for each in chapters())}")


@dataclass(frozen=True)
class Verdict:
    """The result of one law."""

    law: str
    """The sentence."""
    problem: str | None
    """What is wrong, or None where the law holds."""
    crashed: bool = False
    """The code raised an error other than the law's own."""


class Refused(ValueError):
    """A module that cannot be graded at all: missing, unreadable, not the learner's own work."""


def load_module(path: Path, chapter: Chapter) -> ModuleType:
    """Import a file as a module of its own; Refused if it is not a file of this chapter that its author wrote.

    1. The answer must not be imported: neither edu nor a chapter's solution, except what start.py itself imports.
    2. Every name that the chapter asks for must be there, and defined in this file or one beside it.
    """
    if not path.is_file():
        raise Refused(f"{path}: no such file; `make start CHALLENGE={chapter.number}` makes {chapter.mine}")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise Refused(f"{path}: not readable as Python: {error}") from None
    given = imported_names(ast.parse((chapter.folder / "start.py").read_text(encoding="utf-8")))
    borrowed = {name for name in imported_names(tree) - given if name.split(".")[0] in ("edu", "course")}
    if borrowed:
        raise Refused(f"{path} imports {', '.join(sorted(borrowed))}: write it yourself, the answer is not graded")
    spec = importlib.util.spec_from_file_location(f"graded_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.resolve().parent))  # a file may import its neighbours
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise Refused(f"{path} cannot be imported: {describe_error(error, path)}") from None
    finally:
        sys.path.remove(str(path.resolve().parent))
    missing = [name for name in chapter.provides if not hasattr(module, name)]
    if missing:
        others = [each for each in chapters() if all(hasattr(module, name) for name in each.provides)]
        hint = f"; it looks like chapter {others[0].number}" if others else ""
        raise Refused(f"{path} defines no {', '.join(missing)}, which chapter {chapter.number} asks for{hint}")
    for name in chapter.provides:
        source = source_of(getattr(module, name))
        if source is not None and source.parent != path.resolve().parent and source != path.resolve():
            raise Refused(f"{name} comes from {source}, not from {path}: what is graded must be your own")
    return module


def imported_names(tree: ast.AST) -> set[str]:
    """Return the dotted names of all imported modules, with what is imported from each."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def source_of(value: Any) -> Path | None:
    """Return the file that defines a function or class; None for other values."""
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return None
    try:
        return Path(inspect.getsourcefile(inspect.unwrap(value)) or "").resolve()
    except TypeError:
        return Path("built into Python")


def watch_answers(chapter: Chapter, path: Path) -> set[str]:
    """Return a set that fills with the answers this process reads from now on, however it opens them.

    Not counted are the graded file itself and what start.py imports.
    """
    given = imported_names(ast.parse((chapter.folder / "start.py").read_text(encoding="utf-8")))
    allowed = {name.rpartition(".")[0] for name in given} | given
    found: set[str] = set()
    if path.resolve().is_relative_to(ROOT):
        allowed.add(".".join(path.resolve().relative_to(ROOT).with_suffix("").parts))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        file = Path(os.path.realpath(os.fsdecode(arguments[0])))
        if not file.is_relative_to(ROOT):
            return
        parts = [part for part in file.relative_to(ROOT).parts if part != "__pycache__"]
        parts[-1] = parts[-1].partition(".")[0]  # of solution.py and of solution.cpython-313.pyc
        answer = parts[0] == "edu" or (parts[0] == "course" and parts[-1] in ("solution", "reference"))
        if answer and ".".join(parts) not in allowed:
            found.add(".".join(parts))

    sys.addaudithook(hook)
    return found


def is_the_solution(module: ModuleType, chapter: Chapter, solution: ast.Module) -> bool:
    """Whether all functions and classes that a chapter asks for are those of its solution, docstrings aside."""
    answers = {node.name: _code(node) for node in solution.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for name in answers.keys() & set(chapter.provides):
        try:
            source = textwrap.dedent(inspect.getsource(getattr(module, name)))
            if _code(ast.parse(source).body[0]) != answers[name]:
                return False
        except (TypeError, OSError, SyntaxError):  # no function or class with a source
            return False
    return True


def _code(tree: ast.AST) -> str:
    """Return a definition as text that does not depend on docstrings, comments and layout."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            node.body = [
                each for each in node.body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
            ]
    return ast.dump(tree)


def describe_error(error: BaseException, path: Path) -> str:
    """Return an error as one line, with the last line of the learner's file that it passed through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    at = f" at {path.name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{at}: {' '.join(str(error).split()) or 'no message'}"


def check(
    chapter: Chapter, module: Any, path: Path, laws: dict[str, Callable[[Any], None]] | None = None
) -> list[Verdict]:
    """Run every law of a chapter on a module (or on any object with the chapter's names)."""
    verdicts = []
    for name, law in (laws or chapter.laws).items():
        sentence = inspect.cleandoc(law.__doc__ or name.replace("_", " "))
        try:
            law(module)
            verdicts.append(Verdict(sentence, None))
        except NotImplementedError:
            verdicts.append(Verdict(sentence, "not written yet", crashed=True))
        except AssertionError as error:
            verdicts.append(Verdict(sentence, str(error) or "does not hold"))
        except (Exception, SystemExit) as error:
            verdicts.append(Verdict(sentence, describe_error(error, path), crashed=True))
    assert verdicts, f"{chapter.folder.name} has no laws"
    return verdicts


def grade(chapter: Chapter, path: Path) -> list[Verdict]:
    """Grade a file in a process of its own, so that it can neither end nor change the grader.

    Raises Refused where there is nothing to grade.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "course.grading", str(chapter.number), str(path.absolute()), str(result)]
        try:
            # The laws are assertions, which PYTHONOPTIMIZE would take away.
            environment = {name: value for name, value in os.environ.items() if name != "PYTHONOPTIMIZE"}
            done = subprocess.run(command, cwd=ROOT, env=environment, timeout=TIMEOUT, check=False)
        except subprocess.TimeoutExpired:
            raise Refused(f"{path}: not done after {TIMEOUT} s; is there a loop without an end?") from None
        if not result.is_file():
            raise Refused(f"{path} ended the process (exit status {done.returncode}) before all laws were run")
        found = json.loads(result.read_text(encoding="utf-8"))
    if "refused" in found:
        raise Refused(found["refused"].replace(str(path.absolute()), str(path)))
    verdicts = [Verdict(**each) for each in found["verdicts"]]
    if len(verdicts) != len(chapter.laws):
        raise Refused(f"{path}: {len(verdicts)} of {len(chapter.laws)} laws were run")
    return verdicts


def mutated(chapter: Chapter, mutant: Mutant) -> str:
    """Return the source of the plain solution with one mistake in it."""
    source = (chapter.folder / "solution.py").read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1, f"{mutant.what}: {source.count(mutant.old)} places match, expected one"
    return source.replace(mutant.old, mutant.new)


def _main(number: str, path: str, result: str) -> None:
    """Grade in this process, and write the result as JSON."""
    chapter, own = find_chapter(int(number)), Path(path)
    laws, run = chapter.laws, check  # taken before the file can put others in their place
    solution = ast.parse((chapter.folder / "solution.py").read_text(encoding="utf-8"))
    read = watch_answers(chapter, own)
    try:
        module = load_module(own, chapter)
        if own.resolve() != chapter.folder / "solution.py" and is_the_solution(module, chapter, solution):
            raise Refused(f"{path} is the solution, word for word: write it your own way, the answer is not graded")
        verdicts = run(chapter, module, own, laws)
        if read:
            raise Refused(f"{path} reads {', '.join(sorted(read))}: write it yourself, the answer is not graded")
        found: dict[str, Any] = {"verdicts": [vars(each) for each in verdicts]}
    except Refused as refusal:
        found = {"refused": str(refusal)}
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    del sys.argv[1:]  # where the result goes is not the file's business
    _main(*arguments)
