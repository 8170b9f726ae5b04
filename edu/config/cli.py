"""Command lines and YAML files as configs, and mistakes as one line. No torch here: --help is instant."""

import dataclasses
import os
import re
import sys
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from edu.config.fields import checked, flag, is_optional, type_hints
from edu.config.network import public_url, settings_fault
from edu.config.reading import read_yaml
from edu.config.terminal import printable

C = TypeVar("C")
MESSAGE = 2000  # characters of an error that are printed: it may quote a whole row
CONFIG_HELP = (
    "YAML file of settings, a line `name: value` each; flags beside it win. Example: --config recipes/tiny/sft.yaml"
)
FAST_HELP = "off: compute by the readable code alone, without edu/fast; slower. The same as EDU_FAST=0"


def parse(config_class: type[C], argv: Sequence[str] | None = None) -> C:
    """Turn a command line into a config: defaults, then what `implied` derives, then `--config file.yaml`, then flags."""
    import tyro

    args, hints = list(sys.argv[1:] if argv is None else argv), type_hints(config_class)
    settings: dict[str, Any] = {}
    while (at := next((i for i, arg in enumerate(args) if arg == "--config" or arg.startswith("--config=")), -1)) >= 0:
        _, given, value = args.pop(at).partition("=")
        if not given:
            value = args.pop(at) if at < len(args) else ""
        if not value:
            raise ValueError("--config: name a YAML file of settings")
        settings |= read_settings(Path(value), config_class)
    for at, arg in enumerate(args):  # tyro knows None, and no other spelling
        name, _, value = arg.rpartition("=") if arg.startswith("--") else (args[at - 1] if at else "", "", arg)
        if value.lower() == "none" and any(name == flag(each) and is_optional(hints[each]) for each in hints):
            args[at] = arg[: -len("none")] + "None"
    # tyro would frame what __post_init__ raises; parsed without it and made again, it stays one plain line.
    fast_flag = ("fast", Annotated[Literal["on", "off"], tyro.conf.arg(help=FAST_HELP)], "on")
    config_flag = ("config", Annotated[Path | None, tyro.conf.arg(help=CONFIG_HELP)], None)
    options: Any = {"bases": (config_class,), "frozen": True, "kw_only": True}
    unchecked = dataclasses.make_dataclass(
        config_class.__name__, [config_flag, fast_flag], namespace={"__post_init__": _pass}, **options
    )
    about = re.sub(r"\s+Example: ", "\n\nExample: ", sys.modules["__main__"].__doc__ or "")
    parsed = tyro.cli(unchecked, args=args, default=unchecked(**settings), description=about)
    if parsed.fast == "off":
        os.environ["EDU_FAST"] = "0"  # read by edu.model.fast_path, which no script has loaded yet
    values = {name: checked(flag(name), hint, getattr(parsed, name)) for name, hint in hints.items()}
    if implied := getattr(config_class, "implied", None):
        typed = {arg[2:].partition("=")[0].replace("-", "_") for arg in args if arg.startswith("--")}
        values |= implied({name: values[name] for name in hints if name in settings or name in typed})
    return config_class(**values)


def _pass(_: Any) -> None:
    """Check nothing."""


def read_settings(path: Path, config_class: type) -> dict[str, Any]:
    """Read settings from a YAML file; ValueError names the file, and the key that is not one of the config's."""
    return checked_fields(f"--config {path}", config_class, read_yaml(path) or {})


def checked_fields(place: str, config_class: type, loaded: object) -> dict[str, Any]:
    """Return the fields of a dataclass from a mapping of a file; ValueError names `place` and the key that is wrong."""
    if not isinstance(loaded, dict):
        raise ValueError(f"{place}: expected lines of `name: value`")
    hints, settings = type_hints(config_class), dict[str, Any]()
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name not in hints:
            raise ValueError(f"{place}: unknown setting {str(key)[:80]!r}; known are {', '.join(sorted(hints))}")
        if name in settings:
            raise ValueError(f"{place}: {name} is given twice")
        settings[name] = checked(f"{place}: {key}", hints[name], value)
    return settings


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
    environment["MPLBACKEND"] = "agg"  # figures become files; a notebook exports a backend that only its own kernel has


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
        message = str(error) if fault in str(error) else f"{error}: {fault}"
        print(f"error: {printable(public_url(message)[:MESSAGE])}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code or 0)
