"""The map is kept: imports go one way, files stay small, and the documents name no machine."""

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A wing imports only from the wings before it; edu/fast is loaded by one lazy selector alone.
WINGS = [
    "config",
    "data",
    "model",
    "inference",
    "chat",
    "tasks",
    "synthetic",
    "evaluation",
    "training",
    "hub",
    "stages",
    "serving",
]
FAST_SELECTOR = "model/fast_path.py"
# Imports that go the wrong way: (importer, imported). None is left.
EXCEPTIONS: set[tuple[str, str]] = set()
# Lines that a reader opens for each challenge: its main modules with all that they import. Today's cap, which only falls.
CLOSURES = {
    1: (["data/shards.py"], 690),
    2: (["data/loader.py"], 615),
    3: (["training/accelerator.py"], 350),
    4: (["model/gpt.py"], 665),
    5: (["inference/engine.py"], 1300),
    6: (["synthetic/identity.py"], 764),
    7: (["chat/chat_format.py", "chat/sft_data.py"], 1021),
    8: (["stages/sft.py"], 4893),
    9: (["tasks/gsm8k.py"], 242),
    10: (["stages/rl.py"], 6585),
}
MAX_LINES = 11_370  # of edu/ and scripts/ without edu/fast and the embedded world; comment lines are not counted
VAGUE_NAMES = ("util", "utils", "common", "helper", "helpers", "misc")
FORBIDDEN_CALLS = ("eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "torch.hub.load")
HERE = () if ROOT.parent == Path("/") else (f"{ROOT.parent}/",)  # where this very checkout lies
MACHINE_PATHS = ("/home/", "/root/", "/Users/", "/tmp/", "C:\\", *HERE)

LIBRARY = sorted((ROOT / "edu").rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
DOCUMENTS = [path for folder in (".", "docs", "data", "course", "course/*") for path in ROOT.glob(f"{folder}/*.md")]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    """The name under which a file of edu/ stands in LEVELS: all of edu/tasks/ is `tasks`."""
    return path.relative_to(ROOT / "edu").parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported, inside functions too; `from edu import x` gives `edu.x`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports from the root, not relative ones"
            parent = node.module or ""
            yield from (f"{parent}.{alias.name}" for alias in node.names) if parent == "edu" else [parent]


def edu_imports(path: Path) -> set[Path]:
    """The files of edu that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
        for name in names:
            base = ROOT / name.replace(".", "/")
            if name.split(".")[0] == "edu":
                found |= {file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()}
    return found - {path, ROOT / "edu" / "__init__.py"}


def wing_of(path: Path) -> str:
    return path.relative_to(ROOT / "edu").parts[0]


def inside(path: Path) -> str:
    return str(path.relative_to(ROOT / "edu"))


def counted_lines(paths: Iterable[Path]) -> int:
    """Lines that are no comment of their own."""
    return sum(not line.strip().startswith("#") for path in paths for line in path.read_text().splitlines())


def closure(paths: Iterable[Path]) -> set[Path]:
    """The files and all of edu that they import, edu/fast left out."""
    seen, left = set[Path](), list(paths)
    while left:
        path = left.pop()
        if path not in seen and wing_of(path) != "fast":
            seen.add(path)
            left += edu_imports(path)
    return seen


def test_every_file_of_the_library_lies_in_a_wing() -> None:
    assert {wing_of(path) for path in LIBRARY} - {"__init__.py"} == {*WINGS, "fast"}


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_imports_go_one_way_between_wings(path: Path) -> None:
    if path == ROOT / "edu" / "__init__.py":
        assert not edu_imports(path), "edu/__init__.py imports nothing: import the modules"
        return
    order = {wing: i for i, wing in enumerate([*WINGS, "fast"])}
    for imported in edu_imports(path):
        assert wing_of(imported) != "fast" or wing_of(path) == "fast", f"only {FAST_SELECTOR} loads edu/fast"
        if (inside(path), inside(imported)) not in EXCEPTIONS:
            assert order[wing_of(imported)] <= order[wing_of(path)], f"{inside(path)} imports {inside(imported)}"


def test_one_module_alone_loads_the_fast_wing() -> None:
    """By name: everything else works when the folder is deleted."""
    slow = [path for path in LIBRARY + SCRIPTS if (ROOT / "edu" / "fast") not in path.parents]
    assert [name_of(path) for path in slow if "edu.fast." in path.read_text()] == [f"edu/{FAST_SELECTOR}"]


def test_the_exceptions_are_real() -> None:
    real = {(inside(path), inside(imported)) for path in LIBRARY for imported in edu_imports(path)}
    assert not EXCEPTIONS - real, "mended: take it out of EXCEPTIONS"


def test_imports_have_no_circles() -> None:
    graph, done = {path: edu_imports(path) for path in LIBRARY}, set[Path]()
    while ready := {path for path, imported in graph.items() if path not in done and imported <= done}:
        done |= ready
    assert not set(graph) - done, f"in a circle, or above one: {sorted(map(inside, set(graph) - done))}"


@pytest.mark.parametrize("challenge", CLOSURES)
def test_a_challenge_is_read_in_few_lines(challenge: int) -> None:
    mains, most = CLOSURES[challenge]
    files = closure(ROOT / "edu" / main for main in mains)
    assert counted_lines(files) <= most, {inside(path): counted_lines([path]) for path in sorted(files)}


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_import_edu_and_never_each_other(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(ast.parse(path.read_text()))}
    assert not roots & ({"scripts"} | {script.stem for script in SCRIPTS})
    assert "edu" in roots


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_the_library_imports_no_script_and_no_test(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(ast.parse(path.read_text()))}
    assert not roots & {"scripts", "tests", "benchmarks"}


@pytest.mark.parametrize("path", LIBRARY + SCRIPTS, ids=name_of)
def test_nothing_evaluates_text_or_bends_the_import_path(path: Path) -> None:
    tree = ast.parse(path.read_text())
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & set(FORBIDDEN_CALLS)
    assert not {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & {"sys.path"}
    # torch.load(weights_only=True) refuses what would run code by an error of pickle's: its name alone may be imported
    loads_nothing = "from pickle import UnpicklingError"
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and ast.unparse(node) != loads_nothing]
    roots = {
        name.split(".")[0] for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for name in imports(node)
    }
    assert not roots & {"pickle", "dill", "cloudpickle"}
    loads = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"]
    assert all("weights_only=True" in map(ast.unparse, node.keywords) for node in loads)


def test_no_file_is_locked_by_what_windows_lacks() -> None:
    # filelock.FileLock is the operating system's own lock on both; a SoftFileLock outlives a kill.
    for path in LIBRARY + SCRIPTS:
        tree = ast.parse(path.read_text())
        assert "fcntl" not in set(imports(tree)), f"{name_of(path)}: lock by filelock.FileLock"
        assert "SoftFileLock" not in ast.unparse(tree), name_of(path)


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_no_script_is_named_like_a_library(path: Path) -> None:
    # `python scripts/x.py` puts scripts/ first on the import path: a tokenize.py there breaks `import torch`.
    assert path.stem not in sys.stdlib_module_names
    assert path.stem not in packages_distributions()
    assert path.stem not in ("evaluate", "datasets", "tokenizers", "trackio", "wandb", "tensorboard", "peft", "trl")


@pytest.mark.parametrize("path", LIBRARY + SCRIPTS, ids=name_of)
def test_every_file_says_what_it_is_and_has_a_name_that_means_something(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not tree.body or ast.get_docstring(tree), "a file starts with a docstring that says what it is"
    assert not any(part.removesuffix(".py") in VAGUE_NAMES for part in path.relative_to(ROOT).parts)


def test_the_project_can_be_read_in_a_weekend() -> None:
    world = ROOT / "edu" / "synthetic" / "world"
    read = [path for path in LIBRARY if wing_of(path) != "fast" and world not in path.parents]
    assert counted_lines(read + SCRIPTS) <= MAX_LINES


def test_code_is_not_squeezed_to_meet_a_budget() -> None:
    for path in LIBRARY + SCRIPTS:
        bodies = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Module | ast.FunctionDef)
        ]
        for body in bodies:
            starts = [node.lineno for node in body.body]
            assert len(starts) == len(set(starts)), f"{name_of(path)}: two statements on one line"


def test_every_link_of_the_documents_leads_somewhere() -> None:
    for path in DOCUMENTS:
        links = re.findall(r"\]\(([^)#:]+)[)#]", path.read_text())
        assert not [link for link in links if not (path.parent / link).exists()], name_of(path)


def test_documents_and_code_name_no_machine() -> None:
    settings = [*(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "accelerate_configs").rglob("*.yaml")]
    for path in [*DOCUMENTS, *settings, *LIBRARY, *SCRIPTS]:
        found = [place for place in MACHINE_PATHS if place in path.read_text()]
        assert not found, f"{name_of(path)} names {found}"


def test_the_tree_in_the_readme_names_every_wing_script_benchmark_and_page() -> None:
    tree = (ROOT / "README.md").read_text().split("## The tree")[1].split("```")[1]
    named = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.strip()}
    files = [*SCRIPTS, *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "docs").glob("*.md")]
    assert not ({path.name for path in files} | {*WINGS, "fast"}) - named
    assert not {name for name in named if name.endswith(".py")} - {path.name for path in files}
