"""Selection between readable code and its faster twin in edu/fast: the only module that loads edu/fast.

edu/fast computes the same again for one kind of hardware. It is used by itself where it applies, and switched off by
EDU_FAST=0 in the environment or `--fast off` on a command line. Without that folder, or without numba, everything works.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import update_wrapper
from types import ModuleType
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def is_on() -> bool:
    """Return False where the environment switches the fast path off."""
    return os.environ.get("EDU_FAST", "1").lower() not in ("0", "off", "no", "false")


def load(name: str) -> ModuleType | None:
    """Return a module of edu/fast, or None where it is switched off or cannot be had."""
    if not is_on():
        return None
    try:
        return importlib.import_module(f"edu.fast.{name}")
    except ModuleNotFoundError as missing:
        if (missing.name or "").split(".")[0] not in ("edu", "numba", "llvmlite"):
            raise
        return None


def accelerated(readable: F) -> F:
    """Replace a function by its namesake in edu/fast/operators.py, which has the readable one as `__wrapped__`."""
    fast = getattr(load("operators"), readable.__name__, None)
    return readable if fast is None else cast(F, update_wrapper(fast, readable))


def path_in_use() -> str:
    """Name the code that trains and samples here: "fast", "readable", or "fast, sampling readable" without numba.

    Both compute the same up to rounding: a run that changes between them does not stay equal bit for bit.
    """
    if load("operators") is None:
        return "readable"
    return "fast" if importlib.util.find_spec("numba") is not None else "fast, sampling readable"
