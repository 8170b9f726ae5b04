"""Load a user's own task or reward function, named as file.py:name or package.module:name."""

import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from edu.tasks.task import Task


class _Neighbors:
    """Import finder for the modules that lie beside a loaded file, as Python finds those beside a script."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [self.folder], target) if path is None else None


def load(place: str, flag: str = "") -> Callable[..., Any]:
    """Load a function or class by `file.py:name` or `package.module:name`; ValueError says what is wrong with the place.

    A file may import the modules beside it.

    >>> load("fractions:Fraction")(1, 2)
    Fraction(1, 2)
    """
    path, _, name = place.rpartition(":")
    where, expected = f"{flag} {place}".strip(), "expected file.py:name or package.module:name"
    if not path:
        raise ValueError(f"{where}: {expected}")
    try:
        found = getattr(_run(Path(path)), name, None) if path.endswith(".py") else pkgutil.resolve_name(place)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise ValueError(f"{where}: {error}; {expected}") from error
    if not callable(found):
        raise ValueError(f"{where}: no function or class of that name; {expected}")
    return found


def _run(path: Path) -> ModuleType:
    """Import a file as a module of its own name."""
    if not path.is_file():
        raise ValueError(f"no such file as {path}")
    folder = str(path.resolve().parent)
    if not any(isinstance(finder, _Neighbors) and finder.folder == folder for finder in sys.meta_path):
        sys.meta_path.append(_Neighbors(folder))
    spec = importlib.util.spec_from_file_location(f"user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses and pickle look a class's module up by name
    spec.loader.exec_module(module)
    return module


def load_task(place: str, split: str) -> Task:
    """Make the user's task of a split and check its form; ValueError names --task, the place and the example."""
    make = load(place, "--task")
    try:
        inspect.signature(make).bind(split)
    except TypeError as error:
        raise ValueError(f"--task {place}: must take the split, {split!r}, as its only argument ({error})") from error
    task = make(split)
    if missing := [name for name in ("__len__", "get_example", "reward") if not callable(getattr(task, name, None))]:
        raise ValueError(f"--task {place}: gave a {type(task).__name__} without {', '.join(missing)}")
    if not len(task):
        raise ValueError(f"--task {place}: has no problems in the split {split!r}")
    for i in range(len(task)):
        example = task.get_example(i)
        messages = example.get("messages") if isinstance(example, dict) else None
        if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
            raise ValueError(f"--task {place}, example {i} of {split!r}: needs 'messages', a list of messages")
        if "answer" not in example:
            raise ValueError(f"--task {place}, example {i} of {split!r}: needs 'answer', the ground truth")
    return task
