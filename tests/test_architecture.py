"""The map is kept: imports go one way, files stay small, and the documents name no machine."""

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module imports only from lower levels, or from its left on its own line. A new module gets its place here.
LEVELS = [
    "durable command plan config resume metrics page stats grammar endpoint protocol fused runtime transfer shards tokenizer compression packing losses gpt_config masks model kv_cache kernels decoder optim calculator sampling",
    "tasks documents loader chat engine step hub checkpoint",
    "nanochat problems world corpus persona teacher identity sft_data objective rollouts",
    "bits evals measure report",
    "loop serve pretrain sft rl",
]
PLACES = {name: (level, place) for level, line in enumerate(LEVELS) for place, name in enumerate(line.split())}
MAX_LINES_OF_A_FILE = 300
MAX_LINES_IN_ALL = 10_810
VAGUE_NAMES = ("util", "utils", "common", "helper", "helpers", "misc")
FORBIDDEN_CALLS = ("eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "torch.hub.load")
HERE = () if ROOT.parent == Path("/") else (f"{ROOT.parent}/",)  # where this very checkout lies
MACHINE_PATHS = ("/home/", "/root/", "/Users/", "/tmp/", "C:\\", *HERE)

LIBRARY = sorted((ROOT / "edu").rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "data").glob("*.md")]


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


def edu_imports(path: Path) -> set[str]:
    """The modules of edu that a file imports, as LEVELS names them."""
    names = (name.split(".") for name in imports(ast.parse(path.read_text())))
    return {parts[1] for parts in names if parts[0] == "edu" and len(parts) > 1}


def allowed(importer: str, imported: str) -> bool:
    """
    >>> allowed("losses", "packing"), allowed("packing", "losses"), allowed("engine", "model"), allowed("model", "engine")
    (True, False, True, False)
    """
    (level, place), (other_level, other_place) = PLACES[importer], PLACES[imported]
    return imported == importer or other_level < level or (other_level == level and other_place < place)


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_modules_import_only_from_below_or_from_their_left(path: Path) -> None:
    if path == ROOT / "edu" / "__init__.py":
        assert not edu_imports(path), "edu/__init__.py imports nothing: import the modules"
        return
    importer = module_of(path)
    assert importer in PLACES, f"edu/{importer} has no place in LEVELS: give it one"
    wrong = {imported for imported in edu_imports(path) if not allowed(importer, imported)}
    assert not wrong, f"edu.{importer} imports {wrong}, which LEVELS puts above it or to its right"


def test_every_place_in_the_table_is_taken() -> None:
    missing = set(PLACES) - {module_of(path) for path in LIBRARY}
    assert not missing, f"LEVELS names modules that do not exist: {sorted(missing)}"


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


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_no_script_is_named_like_a_library(path: Path) -> None:
    # `python scripts/x.py` puts scripts/ first on the import path: a tokenize.py there breaks `import torch`.
    assert path.stem not in sys.stdlib_module_names
    assert path.stem not in packages_distributions()
    assert path.stem not in ("evaluate", "datasets", "tokenizers", "trackio", "wandb", "tensorboard", "peft", "trl")


@pytest.mark.parametrize("path", LIBRARY + SCRIPTS, ids=name_of)
def test_every_file_is_short_says_what_it_is_and_has_a_name_that_means_something(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_LINES_OF_A_FILE
    assert ast.get_docstring(ast.parse("\n".join(lines))), "a file starts with a docstring that says what it is"
    assert not any(part.removesuffix(".py") in VAGUE_NAMES for part in path.relative_to(ROOT).parts)


def test_the_project_can_be_read_in_a_weekend() -> None:
    lines = {name_of(path): len(path.read_text().splitlines()) for path in LIBRARY + SCRIPTS}
    assert sum(lines.values()) <= MAX_LINES_IN_ALL, sorted(lines.items(), key=lambda item: -item[1])[:10]


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


def test_the_tree_in_the_readme_has_a_line_for_every_file() -> None:
    tree = (ROOT / "README.md").read_text().split("## The tree")[1].split("```")[1]
    named = {line.split()[0] for line in tree.splitlines() if line.strip()}
    files = [*LIBRARY, *SCRIPTS, *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "docs").glob("*.md")]
    top = [path for path in files if path.parent.name != "tasks" and path.name != "__init__.py"]
    assert not {path.name for path in top} - named
    assert not {name for name in named if name.endswith(".py")} - {path.name for path in top}
