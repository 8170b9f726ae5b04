"""Readers of text, JSON and YAML files: content, or a ValueError that names the file and what is wrong in it."""

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which reads 2e-2 as a number (as YAML 1.2 does) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := {name for name in names if names.count(name) > 1}:
            raise yaml.constructor.ConstructorError(problem=f"given twice: {', '.join(sorted(twice))}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[\d.]+[eE][-+]?\d+$"), list("-+.0123456789"))
# What PyYAML's constructors raise on scalars that their tags do not fit, besides its own errors.
_YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, OverflowError)


def read_text(path: Path) -> str:
    """Return a UTF-8 file's text, without a byte order mark."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None


def parse_json(text: str | bytes, place: object) -> Any:
    """Return the value of a JSON text; `place` (a file, a row) is named in errors."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{place}: not valid JSON (nested too deep)") from None
    except ValueError as error:  # bad JSON, bad UTF-8, an integer of thousands of digits
        raise ValueError(f"{place}: not valid JSON ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file."""
    value = parse_json(read_text(path), path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_yaml(path: Path) -> Any:
    """Return a YAML file's content; the ValueError of a bad one names the line too."""
    try:
        return yaml.load(read_text(path), _Loader)
    except RecursionError:
        raise ValueError(f"{path}: not YAML: nested too deep") from None
    except _YAML_ERRORS as error:
        message = " ".join(str(error).split())
        raise ValueError(message if message.startswith(str(path)) else f"{path}: not YAML: {message}") from None
