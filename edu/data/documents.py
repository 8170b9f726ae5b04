"""A stream of encoded documents from parquet shards that starts anywhere; bounded memory.

Row groups are read one after another, CHUNK rows at a time. Every process reads all row groups and keeps each
world_size-th row of the data set: reading costs about a hundredth of encoding, and so any number of processes shares
any number of shards and row groups, down to one of one.
"""

import copy
import itertools
import warnings
import weakref
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from edu.data.parquet import holds_text

CHUNK = 128  # rows decoded and encoded at once: 64 cost 2% of the loader's speed in caches gone cold (docs/LOG.md)
AHEAD = 2  # chunks encoded before they are asked for


class Encoder(Protocol):
    """The part of a tokenizer that the loader needs; edu.data.tokenizer.Tokenizer has it."""

    bos: int

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text, special tokens typed in it being ordinary text."""
        ...


# One row of the data set, encoded: its origin (epoch, shard, row group, row); its ids, None where it holds nothing to
# learn from; how many rows could not be read, this one included. A plain tuple costs a fifth of a named one.
Document = tuple[tuple[int, int, int, int], np.ndarray | None, int]


@dataclass(frozen=True)
class Shard:
    """One parquet file, as its footer describes it."""

    path: Path
    size: int
    groups: tuple[int, ...]

    def name(self) -> tuple[str, int, int]:
        """Return its identity in a state, wherever its folder moves: file name, bytes, rows."""
        return self.path.name, self.size, sum(self.groups)


@dataclass
class Documents:
    """The documents of shards as one process of several reads them."""

    shards: list[Shard]
    tokenizer: Encoder
    rank: int
    world_size: int
    on_bad: Literal["error", "skip"]
    _opened: tuple[int, pq.ParquetFile] | None = field(default=None, init=False)
    """The shard that is being read: opening it anew for each row group would cost 0.5% of the speed."""

    def stream(self, start: tuple[int, int, int, int], epochs: int | None) -> Generator[list[Document], None, None]:
        """Yield this process's documents from a position on, in chunks; ValueError after an epoch that has none.

        The tokenizer is a copy because a tiktoken encoder is 1.2 times as fast in the thread that first used it.
        """
        own = replace(self, tokenizer=copy.deepcopy(self.tokenizer))
        groups = [(i, group, count) for i, shard in enumerate(self.shards) for group, count in enumerate(shard.groups)]
        found = start > (0, 0, 0, 0)
        for epoch in itertools.count(start[0]) if epochs is None else range(start[0], epochs):
            offset = 0
            for shard, group, count in groups:
                rows = np.arange((self.rank - offset) % self.world_size, count, self.world_size)
                offset += count
                if (epoch, shard, group) <= start[:3]:
                    rows = rows[rows >= start[3]] if (epoch, shard, group) == start[:3] else rows[:0]
                for chunk in own.read(epoch, shard, group, rows):
                    found = found or any(ids is not None for _, ids, _ in chunk)
                    yield chunk
            if not found:
                raise ValueError(
                    f"process {self.rank} of {self.world_size} finds no text in the {offset} rows of "
                    f"{len(self.shards)} shards, {self.shards[0].path} the first: give more data, or fewer processes"
                )
            found = False

    def read(self, epoch: int, shard: int, group: int, rows: np.ndarray) -> Iterator[list[Document]]:
        """Yield the documents of the given rows, ascending, of one row group; CHUNK rows are in memory at a time."""
        done = first = 0
        try:
            for texts in self._texts(shard, group) if len(rows) else ():
                chosen = rows[done : np.searchsorted(rows, first + len(texts))]
                if len(chosen):
                    mine = texts if len(chosen) == len(texts) else texts.take(pa.array(chosen - first))
                    yield self._encode(strings(mine), (epoch, shard, group), chosen)
                done, first = done + len(chosen), first + len(texts)
                if done == len(rows):
                    return
        except (pa.ArrowException, OSError) as error:
            problem = f"{self.shards[shard].path}: row group {group} cannot be read ({' '.join(str(error).split())})"
            if self.on_bad == "error":
                raise ValueError(f"{problem}; download the shard again") from error
            warnings.warn(f"{problem}; {len(rows) - done} rows are left out", stacklevel=2)
            yield [((epoch, shard, group, int(rows[-1])), None, len(rows) - done)]

    def _texts(self, shard: int, group: int) -> Iterator[pa.Array]:
        if self._opened is None or self._opened[0] != shard:
            # Reading ahead and Arrow's own threads cost more than they bring to one column that is read chunk by chunk.
            path = self.shards[shard].path
            self._opened = shard, pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False)
        file = self._opened[1]
        for batch in file.iter_batches(CHUNK, row_groups=[group], columns=["text"], use_threads=False):
            yield batch.column(0)

    def _encode(self, texts: list[str | None], group: tuple[int, int, int], rows: np.ndarray) -> list[Document]:
        ids = iter(self.tokenizer.encode_batch([text for text in texts if text]))
        return [((*group, row), next(ids) if text else None, 0) for row, text in zip(rows.tolist(), texts, strict=True)]


def strings(texts: pa.Array) -> list[str | None]:
    """Return the texts of an array; bytes that are no UTF-8 become U+FFFD, rather than ending a run of days."""
    try:
        return texts.to_pylist()
    except UnicodeDecodeError:
        values = texts.cast(pa.large_binary()).to_pylist()
        return [value and value.decode("utf-8", "replace") for value in values]


def scan_shard(path: Path, on_bad: Literal["error", "skip"]) -> Shard:
    """Read a shard's footer; ValueError if it has none, or no such column of text. Skipped, it has no row groups."""
    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such shard") from error
    except (pa.ArrowException, OSError) as error:
        if on_bad == "error":
            raise ValueError(f"{path}: not a readable parquet file ({error}); download it again") from error
        warnings.warn(f"{path}: not a readable parquet file ({error}); left out", stacklevel=3)
        return Shard(path, path.stat().st_size, ())
    if not holds_text(schema):
        names = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise ValueError(f"{path}: needs a column 'text' of strings; has {names}")
    return Shard(path, path.stat().st_size, groups)


class Ahead:
    """Iterator over a generator's items, each made by one background thread up to AHEAD before it is asked for.

    An executor's thread, unlike a daemon thread, is waited for at exit, so it is never torn down inside pyarrow's code;
    and the generator is closed before modules go.
    """

    def __init__(self, items: Generator[list[Document], None, None]) -> None:
        self._items = items
        self._pool = ThreadPoolExecutor(1, "loader")
        self._pending = deque(self._submit() for _ in range(AHEAD))
        weakref.finalize(self, _stop, self._pool, items)

    def _submit(self) -> Future[list[Document] | None]:
        return self._pool.submit(next, self._items, None)

    def __iter__(self) -> Iterator[list[Document]]:
        return self

    def __next__(self) -> list[Document]:
        item = self._pending.popleft().result() if self._pending else None
        if item is None:
            raise StopIteration
        self._pending.append(self._submit())
        return item


def _stop(pool: ThreadPoolExecutor, items: Generator[list[Document], None, None]) -> None:
    pool.shutdown(cancel_futures=True)
    items.close()
