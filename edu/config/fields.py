"""Fields of a config: their names as flags, and their values checked against their annotations."""

import dataclasses
import json
from functools import lru_cache
from typing import Any, get_args, get_type_hints


def flag(name: str) -> str:
    """Return a field's name as it is typed.

    >>> flag("batch_size")
    '--batch-size'
    """
    return f"--{name.replace('_', '-')}"


@lru_cache
def type_hints(config_class: type) -> dict[str, Any]:
    """Return the annotation of each field of a dataclass, bounds included."""
    hints = get_type_hints(config_class, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def is_optional(hint: Any) -> bool:
    """Return whether None is a value of a type."""
    return type(None) in get_args(hint)


def checked(label: str, hint: Any, value: Any) -> Any:
    """Return a value as its annotation wants it: text as a path, a list as a tuple, `none` as None; numbers are finite.

    Raises ValueError, which names `label` and the value, where type or bounds are not met.

    >>> from pathlib import Path
    >>> checked("--seed", int | None, "NONE"), checked("--out", Path, "runs").name
    (None, 'runs')
    >>> checked("--max-steps", int, True)
    Traceback (most recent call last):
    ValueError: --max-steps True: must be a valid integer
    """
    from pydantic import TypeAdapter, ValidationError

    if is_optional(hint) and str(value).lower() == "none":
        return None
    try:
        return TypeAdapter(hint).validate_json(json.dumps(value, default=str, allow_nan=False), strict=True)
    except ValidationError as error:
        why = error.errors()[0]["msg"].replace("Input should be", "must be").replace("a valid array", "a list")
    except (ValueError, RecursionError):  # of json.dumps
        why = "must be finite"
    raise ValueError(f"{label} {str(value)[:200]}: {why}")


def check_fields(config: Any) -> None:
    """Check each field of a frozen dataclass against its annotation, and give it the annotated type; for __post_init__."""
    for name, hint in type_hints(type(config)).items():
        object.__setattr__(config, name, checked(flag(name), hint, getattr(config, name)))
