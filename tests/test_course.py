"""The course: the reference and the plain solution keep every law; stubs, other files and known mistakes do not."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from course import grading
from course.grading import Chapter, Mutant, Refused, chapters, check, grade, load_module, mutated

CHAPTERS = {chapter.number: chapter for chapter in chapters()}
ANOTHER_WAY = Path(__file__).parent / "data" / "course_solutions"
QUICK = 2  # mutants of each chapter in the quick suite


def name_of(value: object) -> str:
    return str(value.number) if isinstance(value, Chapter) else getattr(value, "what", str(value))


def mutants() -> list:
    return [
        pytest.param(chapter, mutant, marks=() if i < QUICK else pytest.mark.slow, id=f"{chapter.number}-{mutant.what}")
        for chapter in CHAPTERS.values()
        for i, mutant in enumerate(chapter.mutants)
    ]


@pytest.mark.parametrize("chapter", CHAPTERS.values(), ids=name_of)
def test_the_plain_solution_keeps_every_law(chapter: Chapter) -> None:
    path = chapter.folder / "solution.py"
    verdicts = check(chapter, load_module(path, chapter), path)
    assert not [each for each in verdicts if each.problem]


REFERENCES = [chapter for chapter in CHAPTERS.values() if (chapter.folder / "reference.py").is_file()]


@pytest.mark.parametrize("chapter", REFERENCES, ids=name_of)
def test_the_library_keeps_every_law_under_the_names_of_the_chapter(chapter: Chapter) -> None:
    reference = importlib.import_module(f"course.{chapter.folder.name}.reference")
    verdicts = dict(zip(chapter.laws, check(chapter, reference, chapter.folder / "reference.py"), strict=True))
    excused = getattr(reference, "UNTESTABLE", {})
    assert not {name: each for name, each in verdicts.items() if each.problem and name not in excused}


@pytest.mark.parametrize(("chapter", "mutant"), mutants())
def test_a_known_mistake_fails_the_law_named_for_it_with_a_message(
    chapter: Chapter, mutant: Mutant, tmp_path: Path
) -> None:
    path = tmp_path / "mutant.py"
    path.write_text(mutated(chapter, mutant))
    module = load_module(path, chapter)
    verdicts = dict(zip(chapter.laws, check(chapter, module, path), strict=True))
    verdict = verdicts[mutant.law]
    assert verdict.problem, f"'{mutant.what}' survives its law; fails {[k for k, v in verdicts.items() if v.problem]}"
    assert not verdict.crashed, f"'{mutant.what}' crashes the law: {verdict.problem}"
    assert len(verdict.problem) > 30, "the message tells a learner what was seen and where to look"


@pytest.mark.parametrize("chapter", CHAPTERS.values(), ids=name_of)
def test_every_chapter_has_at_least_six_known_mistakes(chapter: Chapter) -> None:
    assert len(chapter.mutants) >= 6
    assert {mutant.law for mutant in chapter.mutants} <= set(chapter.laws)


@pytest.mark.parametrize("chapter", CHAPTERS.values(), ids=name_of)
def test_start_as_it_is_keeps_no_law(chapter: Chapter) -> None:
    verdicts = grade(chapter, chapter.folder / "start.py")
    written = [verdict for verdict in verdicts if "not written yet" not in str(verdict.problem)]
    assert not written, written


def other_chapter(chapter: Chapter) -> Chapter:
    numbers = list(CHAPTERS)
    return CHAPTERS[numbers[numbers.index(chapter.number) - 1]]


@pytest.mark.parametrize("chapter", CHAPTERS.values(), ids=name_of)
def test_a_file_of_another_chapter_and_an_empty_one_are_refused_with_a_reason(chapter: Chapter, tmp_path: Path) -> None:
    empty, other = tmp_path / "empty.py", other_chapter(chapter)
    empty.write_text("")
    with pytest.raises(Refused, match="defines no"):
        load_module(empty, chapter)
    with pytest.raises(Refused):
        load_module(other.folder / "solution.py", chapter)


CHEATS = {
    "imports edu": ("import edu.model.gpt\n", "answer is not graded"),
    "imports the solution": ("from course.{folder}.solution import *\n", "answer is not graded"),
    "ends the process": ("import os\nos._exit(0)\n", "ended the process"),
    "raises": ("1 / 0\n", "ZeroDivisionError at cheat.py:1"),
    "has a syntax error": ("def f(:\n", "not readable as Python"),
    "reads the solution": (
        "from pathlib import Path\nexec(compile(Path('course/{folder}/solution.py').read_text(), __file__, 'exec'))\n",
        "reads course",
    ),
    "wraps the solution": (
        "import importlib\nhidden = importlib.import_module('course.{folder}.solution')\n"
        "def download_shard(*args, **kwargs): return hidden.download_shard(*args, **kwargs)\n",
        "reads course",
    ),
    "writes the result": (
        "import os, sys\nopen(sys.argv[3], 'w').write('{{}}')\nos._exit(0)\n",
        "IndexError",
    ),
    "exits": ("raise SystemExit(0)\n", "ended the process"),
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_what_is_not_ones_own_work_is_not_graded(cheat: str, tmp_path: Path) -> None:
    chapter, (source, reason) = next(iter(CHAPTERS.values())), CHEATS[cheat]
    path = tmp_path / "cheat.py"
    path.write_text(source.format(folder=chapter.folder.name))
    with pytest.raises(Refused, match=reason):
        grade(chapter, path)


def test_the_solution_word_for_word_is_not_graded(tmp_path: Path) -> None:
    chapter, path = CHAPTERS[10], tmp_path / "rl.py"
    path.write_text("# mine\n" + (chapter.folder / "solution.py").read_text())
    with pytest.raises(Refused, match="word for word"):
        grade(chapter, path)


@pytest.mark.parametrize(
    "trick",
    [
        "g = sys.modules['__main__']\ng.check = lambda c, *_: [g.Verdict('', None) for _ in c.laws]\n",
        "m = sys.modules['__main__'].find_chapter(10).laws_module\n"
        "for n in list(vars(m)):\n    if n.startswith('law_'): setattr(m, n, lambda _: None)\n",
    ],
)
def test_a_file_that_changes_the_grader_keeps_no_law(
    trick: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rl.py"
    bodies = "def f(*a, **k): return None\nadvantages = policy_loss = sample = token_logprobs = rl_step = f\n"
    path.write_text("import sys\n" + trick + bodies)
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")  # which would take the laws' assertions away
    assert all(verdict.problem for verdict in grade(CHAPTERS[10], path))


@pytest.mark.parametrize("chapter", CHAPTERS.values(), ids=name_of)
def test_a_correct_solution_written_another_way_keeps_every_law(chapter: Chapter) -> None:
    verdicts = grade(chapter, ANOTHER_WAY / f"ch{chapter.number:02}.py")
    assert not [each for each in verdicts if each.problem]


def test_a_name_that_another_file_defines_is_refused(tmp_path: Path) -> None:
    chapter = CHAPTERS[4]
    path = tmp_path / "block.py"
    loader = "import importlib\nsolution = importlib.import_module('course.ch04_block.solution')\nglobals().update(vars(solution))\n"
    path.write_text(loader)
    with pytest.raises(Refused, match="must be your own"):
        load_module(path, chapter)


def test_a_loop_without_an_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "loop.py"
    path.write_text("while True:\n    pass\n")
    monkeypatch.setattr(grading, "TIMEOUT", 5)
    with pytest.raises(Refused, match="without an end"):
        grade(CHAPTERS[4], path)


def course(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command line in a copy of the course, as a learner runs it."""
    return subprocess.run([sys.executable, "-m", "course", *args], cwd=cwd, capture_output=True, text=True, check=False)


def test_start_grade_hint_and_progress_from_the_command_line(tmp_path: Path) -> None:
    shutil.copytree(grading.ROOT / "course", tmp_path / "course", ignore=shutil.ignore_patterns("__pycache__"))
    started = course("start", "4", cwd=tmp_path)
    mine = tmp_path / "my" / "block.py"
    assert (started.returncode, mine.is_file()) == (0, True), started.stderr
    assert "is there already" in course("start", "4", cwd=tmp_path).stdout
    graded = course("grade", "4", cwd=tmp_path)
    assert (graded.returncode, f"0 of {len(CHAPTERS[4].laws)} laws hold" in graded.stdout) == (1, True), graded.stdout
    shutil.copyfile(ANOTHER_WAY / "ch04.py", mine)
    graded = course("grade", "4", cwd=tmp_path)
    assert (graded.returncode, "FAIL" in graded.stdout) == (0, False), graded.stdout
    assert "Hint 2 of 3" in course("hint", "4", "2", cwd=tmp_path).stdout
    assert "#" * 20 in course("progress", cwd=tmp_path).stdout
    wrong = course("grade", "99", cwd=tmp_path)
    assert (wrong.returncode, "choose one of" in wrong.stderr) == (2, True)


@pytest.mark.parametrize("chapter", CHAPTERS.values(), ids=name_of)
def test_a_chapter_has_all_its_parts(chapter: Chapter) -> None:
    readme = (chapter.folder / "README.md").read_text()
    for part in (
        "## Why it exists",
        "## Picture",
        "## Pitfalls",
        "## Questions",
        "## What happens without it",
        "## Read on",
    ):
        assert part in readme, f"{chapter.folder.name}/README.md has no '{part}'"
    assert readme.count("<details><summary>Hint") == 3
    assert {"picture.py", "picture.png", "ablation.py", "ablation.png"} <= {
        path.name for path in chapter.folder.iterdir()
    }
