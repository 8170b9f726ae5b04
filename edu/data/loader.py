"""The streaming tokenizing dataloader: parquet shards in, batches of (B, T) inputs and targets out (challenge 2).

    shards -> documents, encoded (edu.data.documents) -> rows of T + 1 tokens (edu.data.packing) -> inputs, targets

A language model predicts each token from those before it. A row of T + 1 tokens therefore gives T inputs, all but its last
token, and T targets, all but its first: targets[t] is the token that follows inputs[t].

    row      <bos>  The  sky  is    blue  <bos>
    inputs   <bos>  The  sky  is    blue
    targets  The    sky  is   blue  <bos>

The last <bos> begins the next document: predicting it is learning that a text has ended. A Batch also has weights, 0
where there is nothing to learn, and positions, which restart at 0 with each document so that attention does not cross
documents. LoaderState and Loader make a stream resumable: every batch comes with the state that gives the next one.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from edu.data.documents import Ahead, Documents, Encoder, scan_shard
from edu.data.packing import IGNORE, Batch, Key, StreamPacker, collate

# The packing buffer stops taking documents at this many tokens, even if it holds fewer than buffer_size.
BUFFER_TOKENS = 1 << 22


def stream_batches(
    paths: Sequence[Path | str],
    tokenizer: Encoder,
    batch_size: int,
    sequence_length: int,
    rank: int = 0,
    world_size: int = 1,
    state: "LoaderState | None" = None,
    *,
    epochs: int | None = None,
    buffer_size: int = 256,
    on_bad: Literal["error", "skip"] = "error",
) -> "Iterator[tuple[Batch, LoaderState]]":
    """Stream batches of the texts of parquet shards, without end or for `epochs` passes.

    Every row and every document starts with BOS. A document that does not fit continues in a later row, after another
    BOS (see StreamPacker). Rows are full, weights 1. With `epochs`, the end of the last batch is filled with IGNORE.

    rank, world_size: index of this process and number of processes; each takes every world_size-th document.
    state: continue after the batch that this came with. Shards, rank and world size must be the same; batch_size and
    sequence_length may differ.
    buffer_size: documents held at once; best-fit packing chooses among them (figures in docs/LOG.md).
    on_bad: "error" raises for a shard or a row group that cannot be read; "skip" warns, counts its rows and continues.
    ValueError for shards that are missing, unreadable, without a column of text, or not those of the state.
    """
    assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
    assert min(batch_size, sequence_length, buffer_size) > 0, f"{batch_size=} {sequence_length=} {buffer_size=}"
    shards = [scan_shard(Path(path), on_bad) for path in paths]
    if not any(sum(shard.groups) for shard in shards):
        raise ValueError(f"no rows in {len(shards)} shards{f', {shards[0].path} the first' if shards else ''}")
    # A state is refused unless shards, rank and world size are the ones it was saved with.
    fresh = LoaderState(tuple(shard.name() for shard in shards), rank, world_size)
    if state:
        check_state(state, fresh)
    source = Documents(shards, tokenizer, rank, world_size, on_bad)
    packer = StreamPacker(tokenizer.bos, sequence_length)
    return batches(Loader(source, packer, buffer_size, state or fresh, epochs), batch_size, pad=tokenizer.bos)


def batches(loader: "Loader", batch_size: int, pad: int) -> "Iterator[tuple[Batch, LoaderState]]":
    """Yield batches until the documents run out; the last one then has positions with nothing to learn."""
    # 1. Fill rows with documents, each after a BOS: tokens (B, T + 1), positions within the document (B, T).
    while rows := loader.packer.rows(batch_size, loader.refill):
        tokens, positions = rows
        # 2. Shift by one: the model reads inputs[:, t] and should predict targets[:, t], the token after it.
        # They are copies, because step 3 writes to inputs, which would otherwise share memory with targets.
        inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()  # (B, T) each
        # 3. Every token weighs the same in the loss; the unfilled end of the last rows has weight 0.
        inputs[inputs == IGNORE] = pad
        weights = (targets != IGNORE).astype(np.float32)
        # 4. The state is read after the rows were filled, so it leads to the next batch.
        yield Batch(*map(torch.from_numpy, (inputs, targets, weights, positions))), loader.state()


def validation_batches(
    paths: Sequence[Path | str],
    tokenizer: Encoder,
    batch_size: int,
    sequence_length: int,
    max_batches: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yield the first max_batches batches (over all processes) of one pass: the same rows for every world size.

    A metric over these batches is therefore the same, too. Process r takes batches r, r + world_size, ...; all get the
    same number, so the last batch of some may have nothing to learn. Every process encodes all documents; they are few.
    """
    stream = stream_batches(paths, tokenizer, batch_size, sequence_length, epochs=1, buffer_size=64)
    first = itertools.islice((batch for batch, _ in stream), max_batches)
    nothing = collate([[]] * batch_size, sequence_length, tokenizer.bos)  # batch_size empty rows
    while group := list(itertools.islice(first, world_size)):
        yield group[rank] if rank < len(group) else nothing


@dataclass(frozen=True)
class LoaderState:
    """Position of one process's stream, as coordinates into the shards; `to_dict` and `from_dict` convert it for JSON."""

    shards: tuple[tuple[str, int, int], ...]
    """File name, bytes and rows of every shard."""
    rank: int
    world_size: int
    position: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Epoch, shard, row group and row of the next document to take into the packing buffer."""
    buffer: tuple[Key, ...] = ()
    """Keys of the waiting documents, oldest first: tokens with BOS, epoch, shard, row group, row, offset in tokens."""
    documents: int = 0
    """Number of documents taken into the buffer so far, over all epochs."""
    empty: int = 0
    """Rows left out because their text is null or empty."""
    corrupt: int = 0
    """Rows left out because they cannot be read (on_bad="skip")."""

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "LoaderState":
        """Rebuild a state from to_dict's output, with JSON's lists turned back into tuples; ignore fields of earlier versions."""
        known = {field.name: state[field.name] for field in fields(cls)}
        nested = {name: tuple(map(tuple, state[name])) for name in ("shards", "buffer")}
        return cls(**{**known, **nested, "position": tuple(state["position"])})


class Loader:
    """Running stream: the documents to come, the packing buffer, and the counts that the state reports."""

    def __init__(
        self, source: Documents, packer: StreamPacker, buffer_size: int, state: LoaderState, epochs: int | None
    ) -> None:
        self.source, self.packer, self.buffer_size, self.start = source, packer, buffer_size, state
        self.position = state.position
        self.documents, self.empty, self.corrupt = state.documents, state.empty, state.corrupt
        self._restore()
        # Ahead reads beyond what was taken. self.position counts only what was taken, so a resumed run encodes that
        # part again.
        self.coming = itertools.chain.from_iterable(Ahead(source.stream(state.position, epochs)))

    def state(self) -> LoaderState:
        """Return the state from which the next batch follows."""
        owner = (self.start.shards, self.start.rank, self.start.world_size)
        waiting = tuple(self.packer.buffer.items)
        return LoaderState(*owner, self.position, waiting, self.documents, self.empty, self.corrupt)

    def refill(self) -> None:
        """Take documents into the packing buffer until it is full, and count the rows left out."""
        packer = self.packer
        # Many documents to choose from fill rows well; the second bound keeps memory finite if they are long.
        while len(packer.buffer.items) < self.buffer_size and packer.tokens < BUFFER_TOKENS:
            if not (document := next(self.coming, None)):
                return
            origin, ids, unreadable = document  # origin: epoch, shard, row group, row
            self.position = (*origin[:3], origin[3] + 1)
            if ids is not None:
                packer.add((*origin, 0), ids)
                self.documents += 1
            elif unreadable:
                self.corrupt += unreadable
            else:
                self.empty += 1

    def _restore(self) -> None:
        """Read and encode again the documents that were in the packing buffer, in their order."""
        # The state holds coordinates, not token ids.
        # 1. Collect the rows by row group, so that each is opened once.
        wanted: dict[tuple[int, int], set[int]] = {}
        for _, _, shard, group, row, _ in self.start.buffer:
            wanted.setdefault((shard, group), set()).add(row)
        ids = {}
        for (shard, group), rows in wanted.items():
            # The epoch does not matter here: a row has the same text in each. So read with 0 and drop it from the key.
            read = self.source.read(0, shard, group, np.array(sorted(rows)))
            ids |= {origin[1:]: found for origin, found, _ in itertools.chain.from_iterable(read)}
        # 2. Put them back, oldest first; a document cut before continues at its offset.
        for size, *origin, offset in self.start.buffer:
            found = ids.get(tuple(origin[1:]))
            if found is None or 1 + len(found) - offset != size:
                path = self.source.shards[origin[1]].path
                raise ValueError(
                    f"{path}: row {origin[3]} of row group {origin[2]} does not have as many tokens as when the position was saved: "
                    "the shard or the tokenizer has changed; start a new run"
                )
            self.packer.add((*origin, offset), found[offset:])


def check_state(state: LoaderState, fresh: LoaderState) -> None:
    """Raise ValueError unless a saved state belongs to these shards and this process."""
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
