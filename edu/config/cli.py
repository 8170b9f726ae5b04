"""The border where a command line becomes a config, and an error a message. No torch here: --help is instant."""

import dataclasses
import os
import sys
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from edu.config.network import settings_fault

C = TypeVar("C")
CONVERSIONS: dict[str, Callable[[Any], Any]] = {"Path": Path, "tuple": tuple, "bool": bool, "int": int, "float": float}
"""How a YAML value becomes a field's, by a name in the field's type; the first that occurs counts."""


def parse(config_class: type[C], argv: Sequence[str] | None = None) -> C:
    """Turn a command line into a config: defaults, then what `implied` says, then `--config file.yaml`, then flags."""
    import tyro

    args = list(sys.argv[1:] if argv is None else argv)
    settings: dict[str, Any] = {}
    while (at := next((i for i, arg in enumerate(args) if arg == "--config" or arg.startswith("--config=")), -1)) >= 0:
        _, given, value = args.pop(at).partition("=")
        if not given:
            value = args.pop(at) if at < len(args) else ""
        settings |= read_settings(Path(value), config_class)
    # tyro would frame what __post_init__ raises; parsed without it and made again, it stays one plain line.
    unchecked = type(config_class.__name__, (config_class,), {"__doc__": config_class.__doc__, "__post_init__": _pass})
    parsed = tyro.cli(unchecked, args=args, default=unchecked(**settings))
    names = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    values = {name: getattr(parsed, name) for name in names}
    if implied := getattr(config_class, "implied", None):
        typed = {flag[2:].partition("=")[0].replace("-", "_") for flag in args if flag.startswith("--")}
        values |= implied({name: values[name] for name in names if name in settings or name in typed})
    return config_class(**values)


def _pass(_: Any) -> None:
    """Check nothing."""


def read_yaml(path: Path) -> Any:
    """A YAML file's content, or a ValueError that names the file and the line."""
    import yaml

    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def read_settings(path: Path, config_class: type) -> dict[str, Any]:
    """Settings from a YAML file; ValueError names the file and the key that is not one of the config's."""
    loaded = read_yaml(path) or {}
    if not isinstance(loaded, dict):
        raise ValueError(f"--config {path}: expected lines of `name: value`")
    types = {field.name: str(field.type) for field in dataclasses.fields(config_class)}
    settings = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name not in types:
            raise ValueError(f"--config {path}: unknown setting {key!r}; known are {', '.join(sorted(types))}")
        try:
            settings[name] = _typed(value, types[name])
        except (TypeError, ValueError):
            raise ValueError(f"--config {path}: {key}: {value!r} is not a value of it ({types[name]})") from None
    return settings


def _typed(value: Any, kind: str) -> Any:
    """A YAML value as the field's type: YAML reads 2e-2 as text."""
    if value is None and "None" in kind:
        return None
    for name, convert in CONVERSIONS.items():
        if name in kind:
            converted: Any = convert(value)
            if name in ("int", "bool") and (converted != value or isinstance(value, bool) != (name == "bool")):
                raise TypeError
            return converted
    if not isinstance(value, str):
        raise TypeError
    return value


def prepare_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Complete variables that libraries read at import: loopback in NO_PROXY, one certificate file, HF_ENDPOINT's scheme."""
    direct = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    if direct.strip() != "*":
        listed = [host.strip() for host in direct.split(",") if host.strip()]
        environment["NO_PROXY"] = environment["no_proxy"] = ",".join(
            dict.fromkeys([*listed, "127.0.0.1", "localhost", "::1"])
        )
    bundle = environment.get("REQUESTS_CA_BUNDLE") or environment.get("CURL_CA_BUNDLE")
    if bundle and not environment.get("SSL_CERT_FILE"):  # httpx2 reads only this one, requests only those
        environment["SSL_CERT_FILE"] = bundle
    if (endpoint := environment.get("HF_ENDPOINT")) and "://" not in endpoint:
        environment["HF_ENDPOINT"] = f"https://{endpoint}"


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's main(): a user's mistake becomes one line on stderr and exit code 2, never a traceback."""
    # OpenMP's threads spin briefly and then sleep while they wait. Endless spinning made training two to three times
    # slower than sleeping where another program kept a core busy (docs/LOG.md, 2026-11-22).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    prepare_environment()
    try:
        code = main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        sys.exit(141)
    except (ValueError, OSError, ImportError) as error:
        fault = settings_fault(error)
        if isinstance(error, ImportError) and not fault:
            raise
        print(f"error: {error}" if fault in str(error) else f"error: {error}: {fault}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code or 0)
