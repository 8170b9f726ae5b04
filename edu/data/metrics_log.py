"""Files of metrics: one JSON object a line, appended step by step, whole again after a kill."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from edu.config.metrics import STEP
from edu.config.reading import parse_json
from edu.data.atomic_io import write_text


def _plain(value: object) -> object:
    """Return a JSON value: numbers of torch and numpy become Python's, and what is not finite becomes null.

    >>> _plain(float("nan")), _plain(3), _plain("text")
    (None, 3, 'text')
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    number = float(value)  # type: ignore[arg-type]
    return number if math.isfinite(number) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file, oldest first; none if there is no file. A last line torn by a kill is left out.

    Raises ValueError, naming file and line, where another line is not a JSON object.
    """
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, path)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):  # the text after the last newline is what a kill leaves half-written
            raise ValueError(f"{path}, line {number}: not a JSON object; delete the line to go on without it")
    return rows


class MetricsLog:
    """Append one JSON line per step to a file, flushed at once; one process of a run owns it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with MetricsLog(Path(folder) / "metrics.jsonl") as log:
    ...         for step in range(5):
    ...             log.write(step, {"loss": 4.0 - step})
    ...         log.keep(lambda row: row[STEP] <= 1)
    ...     read_metrics(Path(folder) / "metrics.jsonl")
    [{'step': 0, 'loss': 4.0}, {'step': 1, 'loss': 3.0}]
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            self._write(read_metrics(path))  # else the next row would be glued to a torn one
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, object]) -> None:
        """Append the row of a step; an OSError (a full disk) names the file."""
        row = {STEP: step} | {name: _plain(value) for name, value in values.items()}
        try:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Keep the rows for which `wanted` is true. All or nothing: a kill leaves the old file or the new."""
        self._file.close()
        self._write([row for row in read_metrics(self.path) if wanted(row)])
        self._file = self.path.open("a", encoding="utf-8")

    def _write(self, rows: Iterable[dict[str, Any]]) -> None:
        write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def close(self) -> None:
        with suppress(OSError):  # of a row that `write` has complained about
            self._file.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
