"""The streaming tokenizing dataloader: parquet shards in, full rows of (B, T) inputs and targets out (challenge 2).

parquet -> row groups -> this process's rows -> ids (edu.data.documents, in one background thread) -> StreamPacker -> Batch.
Each batch comes with the LoaderState that gives the next one, exactly: coordinates into the shards, no ids.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edu.data.documents import Ahead, Encoder, Source, scan_shard
from edu.data.packing import IGNORE, Batch, Key, StreamPacker, shift

BUFFER_TOKENS = 1 << 22  # the packing buffer takes no further document beyond, however few it holds


@dataclass(frozen=True)
class LoaderState:
    """Where one process's stream stands; `to_dict` and `from_dict` take it through JSON."""

    shards: tuple[tuple[str, int, int], ...]
    """File name, bytes and rows of every shard."""
    rank: int
    world_size: int
    position: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Epoch, shard, row group and row of the next document to take into the packing buffer."""
    buffer: tuple[Key, ...] = ()
    """Of each document in it, oldest first: tokens with BOS, epoch, shard, row group, row, offset in tokens."""
    documents: int = 0
    """Taken into the buffer so far, over all epochs."""
    empty: int = 0
    """Rows left out because their text is null or empty."""
    corrupt: int = 0
    """Rows left out because they cannot be read (on_bad="skip")."""
    dropped: int = 0
    """Tokens cut off and thrown away (carry=False)."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "LoaderState":
        """The inverse of to_dict, JSON's lists made tuples again."""
        nested = {name: tuple(map(tuple, state[name])) for name in ("shards", "buffer")}
        return cls(**{**state, **nested, "position": tuple(state["position"])})


class Loader:
    """A stream of (Batch, LoaderState) under way: the source, the packing buffer, and what the state counts."""

    def __init__(self, source: Source, packer: StreamPacker, buffer_size: int, state: LoaderState, epochs: int | None):
        self.source = source
        self.packer = packer
        self.buffer_size = buffer_size
        self.start = state
        self.position = state.position
        self.documents, self.empty, self.corrupt = state.documents, state.empty, state.corrupt
        self.coming = itertools.chain.from_iterable(Ahead(source.documents(state.position, epochs)))
        self._restore()

    def batches(self, batch_size: int) -> Iterator[tuple[Batch, LoaderState]]:
        """Batches until the documents run out; the last one then has places with nothing to learn."""
        whose = (self.start.shards, self.start.rank, self.start.world_size)
        while batch := self.packer.batch(batch_size, self._refill):
            waiting, counts = tuple(self.packer.buffer.items), (self.documents, self.empty, self.corrupt)
            yield batch, LoaderState(*whose, self.position, waiting, *counts, self.packer.dropped)

    def _refill(self) -> None:
        """Take documents into the packing buffer until it is full, and count what was left out."""
        packer = self.packer
        while len(packer.buffer.items) < self.buffer_size and packer.tokens < BUFFER_TOKENS:
            if not (document := next(self.coming, None)):
                return
            place, ids, corrupt = document
            self.position = (*place[:3], place[3] + 1)
            if ids is not None:
                packer.add((*place, 0), ids)
                self.documents += 1
            elif corrupt:
                self.corrupt += corrupt
            else:
                self.empty += 1

    def _restore(self) -> None:
        """Read and encode again the documents that were in the packing buffer, in their order."""
        wanted: dict[tuple[int, int], set[int]] = {}
        for _, _, shard, group, row, _ in self.start.buffer:
            wanted.setdefault((shard, group), set()).add(row)
        ids = {}
        for (shard, group), rows in wanted.items():
            read = self.source.read(0, shard, group, np.array(sorted(rows)))
            ids |= {place[1:]: found for place, found, _ in itertools.chain.from_iterable(read)}
        for size, *place, offset in self.start.buffer:
            found = ids.get(tuple(place[1:]))
            if found is None or 1 + len(found) - offset != size:
                path = self.source.shards[place[1]].path
                raise ValueError(
                    f"{path}: row {place[3]} of row group {place[2]} has not the tokens that the saved position knows: "
                    "the shard or the tokenizer has changed; start a new run"
                )
            self.packer.add((*place, offset), found[offset:])
        self.packer.dropped = self.start.dropped


def stream_batches(
    paths: Sequence[Path | str],
    tokenizer: Encoder,
    batch_size: int,
    sequence_length: int,
    rank: int = 0,
    world_size: int = 1,
    state: LoaderState | None = None,
    *,
    epochs: int | None = None,
    buffer_size: int = 256,
    carry: bool = True,
    column: str = "text",
    on_bad: Literal["error", "skip"] = "error",
) -> Iterator[tuple[Batch, LoaderState]]:
    """Batches of the texts of parquet shards, without end, or `epochs` times through.

    Every document starts with BOS, and so does every row; a document that does not fit goes on in a later row, after a
    BOS of its own (see StreamPacker). Rows are full, weights 1. With `epochs`, the last batch is filled up with IGNORE.

    buffer_size: documents to choose from, which take turns in the rows: at T = 256, a buffer of 64 costs 0.7% of the loss
    reached, one of 1,000 gains 0.2%, for four times the state and colder caches (docs/LOG.md).
    carry: the rest of a cut document goes on, rather than being thrown away (the two compared: docs/benchmarks.md).
    state: go on after the batch that it came with. It holds for the same shards, rank and world size; batch and row
    sizes may change. on_bad: what to do about a shard or a row group that cannot be read; "skip" warns and counts.
    ValueError for shards that are missing, unreadable, without a column of text, or not those of the state.
    """
    assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
    assert min(batch_size, sequence_length, buffer_size) > 0, f"{batch_size=} {sequence_length=} {buffer_size=}"
    shards = [scan_shard(Path(path), column, on_bad) for path in paths]
    if not any(sum(shard.groups) for shard in shards):
        raise ValueError(f"no rows in {len(shards)} shards{f', {shards[0].path} the first' if shards else ''}")
    fresh = LoaderState(tuple(shard.name() for shard in shards), rank, world_size)
    if state:
        check_state(state, fresh)
    source = Source(shards, tokenizer, rank, world_size, column, on_bad)
    loader = Loader(source, StreamPacker(tokenizer.bos, sequence_length, carry), buffer_size, state or fresh, epochs)
    return loader.batches(batch_size)


def validation_batches(
    paths: Sequence[Path | str],
    tokenizer: Encoder,
    batch_size: int,
    sequence_length: int,
    max_batches: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """The first max_batches batches, over all processes, of one pass: always the same rows, whatever the world size.

    So a measure on them is too. Process r takes batches r, r + world_size, ...; each gets as many, the last perhaps
    with nothing to learn in it. All processes encode all of it, which is small.
    """
    stream = stream_batches(paths, tokenizer, batch_size, sequence_length, epochs=1, buffer_size=64)
    batches = itertools.islice((batch for batch, _ in stream), max_batches)
    while group := list(itertools.islice(batches, world_size)):
        if rank < len(group):
            yield group[rank]
        else:
            nothing = np.full((batch_size, sequence_length + 1), IGNORE)
            yield shift(nothing, np.tile(np.arange(sequence_length), (batch_size, 1)), pad=tokenizer.bos)


def check_state(state: LoaderState, fresh: LoaderState) -> None:
    """ValueError unless a saved state is of these shards and this process."""
    if (state.rank, state.world_size) != (fresh.rank, fresh.world_size):
        raise ValueError(
            f"the data position was saved by process {state.rank} of {state.world_size}, this is process {fresh.rank} "
            f"of {fresh.world_size}: resume with {state.world_size} processes, or start a new run"
        )
    for old, new in itertools.zip_longest(state.shards, fresh.shards):
        if old != new:
            was, now = (f"{s[0]} ({s[1]} bytes, {s[2]} rows)" if s else "no shard" for s in (old, new))
            raise ValueError(
                f"the data position was saved with {was} where there is {now}: restore it, or start a new run"
            )
