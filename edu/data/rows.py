"""Rows of a JSON-lines file, a parquet file or a data set of the Hub, each with its place for error messages."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = tuple[str, dict[str, Any]]  # ("file, row 3", fields)


def read_rows(path: Path, column: str = "") -> Iterator[Row]:
    """Yield the rows of a parquet or JSON-lines file, numbered from 1; ValueError on what cannot be read, and on no rows.

    `column`: the only one that is needed of a parquet file.
    """
    count = 0
    for row in _parquet_rows(path, column) if path.suffix == ".parquet" else _json_rows(path):
        count += 1
        yield row
    if not count:
        raise ValueError(f"{path}: no rows; the file is empty")


def _parquet_rows(path: Path, column: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = [column] if column in file.schema_arrow.names else None
            rows = (row for batch in file.iter_batches(1024, columns=columns) for row in batch.to_pylist())
            yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({' '.join(str(error).split())})") from error


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path}, row {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                row = json.loads(text) if text.strip() else None
                if "\\ud" in text.lower():  # half of a surrogate pair, which is no text
                    json.dumps(row, ensure_ascii=False).encode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}: not UTF-8 ({error.reason}); save the file as UTF-8 text") from error
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place}: not valid JSON ({error})") from error
            if not text.strip():
                continue
            if not isinstance(row, dict):
                raise ValueError(f"{place}: expected a JSON object, found {type(row).__name__}")
            yield place, row


def hub_rows(name: str, config: str | None, split: str) -> Iterator[Row]:
    """Yield the rows of a data set of the Hub; ValueError says how to read one that is not for everyone."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        data = load_dataset(name, config, split=split)
    except DatasetNotFoundError as error:
        reason = f"{name}: no such data set, or none that you may read"
        raise ValueError(f"{reason}; check the name, or run `hf auth login`, or set HF_TOKEN") from error
    yield from ((f"{name}, row {number}", dict(row)) for number, row in enumerate(data, start=1))


def text_field(row: dict[str, Any], name: str, place: str) -> str:
    """Return a row's field that has to be text with something in it; ValueError names the row."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place}: field {name!r} is missing or is not text")
    return value
