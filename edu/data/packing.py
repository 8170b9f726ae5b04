"""Packing: pieces of any length into rows of one length by best fit; and Batch, what every stage trains on.

The one algorithm: put the largest piece that fits into the room that is left, until none does. Lists (conversations,
rollouts, problems) go through `pack_rows`, which never cuts a piece. A stream of documents goes through `StreamPacker`,
which cuts one where nothing fits, so that every row is full, and puts the rest back instead of throwing it away.

B batch, T sequence length. A row of T inputs and T targets, shifted by one, comes from T + 1 tokens.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

IGNORE = -1
V = TypeVar("V")
Key = tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Rows ready for the model."""

    inputs: Int64[Tensor, "B T"]
    """Token ids."""
    targets: Int64[Tensor, "B T"]
    """The token after each input; IGNORE where nothing is to be learned."""
    weights: Float32[Tensor, "B T"]
    """w of the loss sum(w * -log p) / N. 0 where targets are IGNORE; elsewhere 0 counts in N all the same."""
    positions: Int64[Tensor, "B T"]
    """Place within the document: each 0 starts a new one, and attention does not look across it."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))

    def split(self, parts: int) -> "list[Batch]":
        """Its rows in as many smaller batches, or one a row where there are fewer rows."""
        return [Batch(*rows) for rows in zip(*(tensor.chunk(parts) for tensor in vars(self).values()), strict=True)]


@dataclass(frozen=True)
class TrainingExample:
    """What is trained as one document: n + 1 tokens give n inputs and n targets."""

    ids: Sequence[int] | np.ndarray
    mask: Sequence[int] | np.ndarray
    """1 where the token is a target to learn, 0 where it is only read; as long as ids."""
    weight: float | np.ndarray = 1.0
    """Of the targets: one number (an advantage), or one for each of ids."""
    positions: np.ndarray | None = None
    """Of ids within the document, where they are not 0, 1, 2, ...: see edu.model.masks.document_mask."""


class BestFit(Generic[V]):
    """A buffer of sized items that finds the largest that fits a room, and the oldest, by bisection.

    Keys are unique tuples that begin with the size; among equal sizes the greatest key is found first. An item larger
    than `limit` fits no room that will be asked for: it is found by its age only, and costs no sorting.

    >>> buffer = BestFit[str]()
    >>> for size, word in [(5, "hello"), (2, "hi"), (3, "hey")]:
    ...     buffer.add((size,), word)
    >>> buffer.fitting(4), buffer.fitting(1), buffer.oldest(), buffer.pop((3,)), len(buffer)
    ((3,), None, (5,), 'hey', 2)
    """

    def __init__(self, limit: float = inf) -> None:
        self.limit = limit
        self._sorted: list[Key] = []
        self.items: dict[Key, V] = {}  # in order of age

    def __len__(self) -> int:
        return len(self.items)

    def add(self, key: Key, item: V) -> None:
        """Put an item in, as the youngest."""
        assert key not in self.items, f"two items {key}"
        if key[0] <= self.limit:
            insort(self._sorted, key)
        self.items[key] = item

    def fitting(self, room: int) -> Key | None:
        """The key of the largest item of at most `room`."""
        at = bisect_left(self._sorted, (room + 1,))
        return self._sorted[at - 1] if at else None

    def oldest(self) -> Key | None:
        """The key of the item that has waited longest."""
        return next(iter(self.items), None)

    def smallest(self) -> Key:
        """The key of the smallest item; all of them have to be within the limit."""
        return self._sorted[0]

    def pop(self, key: Key) -> V:
        """Take an item out."""
        if key[0] <= self.limit:
            del self._sorted[bisect_left(self._sorted, key)]
        return self.items.pop(key)


def pack_rows(items: Sequence[TrainingExample], sequence_length: int, window: int = 4096) -> list[list[int]]:
    """Put pieces, none cut, into rows of at most sequence_length inputs; gives each row as indices into items.

    1. Keep the next `window` pieces at hand. Up to so many in all, this is best-fit decreasing (at most 11/9 of the
       fewest rows: Johnson et al., SIAM J. Comput. 3, 1974); beyond, rows stay near the order of the list.
    2. Fill a row: the largest that fits, again and again; among equals the first of the list.

    Nothing is drawn at random. A piece of more than sequence_length + 1 tokens is the caller's to leave out or shorten.

    >>> pack_rows([TrainingExample([1] * n, [1] * n) for n in (3, 5, 4, 3)], sequence_length=6)
    [[1, 0], [2, 3]]
    """
    buffer, rows, coming = BestFit[None](), [], 0
    while coming < len(items) or len(buffer):
        while coming < len(items) and len(buffer) < window:
            size = len(items[coming].ids) - 1
            assert 1 <= size <= sequence_length, (
                f"piece {coming} has {size + 1} tokens; a row takes 2 to {sequence_length + 1}"
            )
            buffer.add((size, -coming), None)
            coming += 1
        row, room = [], sequence_length
        while key := buffer.fitting(room):
            buffer.pop(key)
            row.append(-key[1])
            room -= key[0]
        rows.append(row)
    return rows


def collate(rows: Sequence[Sequence[TrainingExample]], sequence_length: int, pad: int = 0) -> Batch:
    """Lay out rows of pieces as a Batch: inputs ids[:-1], targets ids[1:] where their mask is 1.

    What a row has left over is a document of `pad` of its own, with nothing to learn. A row may be empty.

    >>> batch = collate([[TrainingExample([5, 6, 7], [0, 0, 1], weight=-0.5), TrainingExample([8, 9], [0, 1], weight=0.0)]], 4)
    >>> batch.inputs.tolist(), batch.targets.tolist(), batch.positions.tolist()
    ([[5, 6, 8, 0]], [[-1, 7, 9, -1]], [[0, 1, 0, 0]])
    >>> batch.weights.tolist()
    [[0.0, -0.5, 0.0, 0.0]]
    """
    B, T = len(rows), sequence_length
    inputs, targets = np.full((B, T), pad, np.int64), np.full((B, T), IGNORE, np.int64)
    weights, positions = np.zeros((B, T), np.float32), np.zeros((B, T), np.int64)
    for b, row in enumerate(rows):
        at = 0
        for piece in row:
            ids, mask = np.asarray(piece.ids, np.int64), np.asarray(piece.mask).astype(bool)
            assert len(ids) == len(mask), f"{len(ids)} ids, {len(mask)} of mask"
            place = slice(at, at := at + len(ids) - 1)
            assert at <= T, f"row {b} has {at} inputs or more; it takes {T}"
            inputs[b, place] = ids[:-1]
            targets[b, place] = np.where(mask, ids, IGNORE)[1:]
            weights[b, place] = np.where(mask, piece.weight, 0.0)[1:]
            positions[b, place] = np.arange(len(ids) - 1) if piece.positions is None else piece.positions[:-1]
        positions[b, at:] = np.arange(T - at)
    return Batch(*map(torch.from_numpy, (inputs, targets, weights, positions)))


class StreamPacker:
    """Fills rows of T + 1 tokens from a buffer of documents, leaving no room in any row.

    1. A row starts with the document that has waited longest, so none waits forever.
    2. The largest that fits whole follows, until none fits.
    3. Then the one that has waited longest is cut to fill the room, and its rest goes back as the youngest.

    Each document, and each rest, takes one token more than its own: the BOS it starts with. So every token of a
    document is a target exactly once, and every document's end is followed by a BOS to predict, unless the row ends
    there. carry=False throws the rests away, and cuts the smallest document to lose the least: every row then starts
    at a document's start. A buffer of one document (see `batch`) is concatenation in the order of the stream.
    """

    def __init__(self, bos: int, sequence_length: int, carry: bool = True) -> None:
        self.carry = carry
        # Slices of memory, not of arrays: packing rows of 256 takes two thirds of the time (docs/LOG.md, 2026-11-24).
        self.buffer = BestFit[memoryview](limit=sequence_length + 1 if carry else inf)
        self.tokens = 0  # waiting in the buffer, BOS included
        self.dropped = 0  # thrown away so far
        self._size = sequence_length + 1
        self._bos = np.array([bos], np.int32).data
        self._unfilled = np.full(self._size, IGNORE, np.int32).data
        self._positions = np.arange(sequence_length)

    def add(self, place: Key, ids: np.ndarray) -> None:
        """Put in a document. place: where it comes from, unique; its last number is the first token's offset there."""
        assert len(ids), f"an empty document at {place}"
        self.buffer.add((1 + len(ids), *place), np.asarray(ids, np.uint32).data)
        self.tokens += 1 + len(ids)

    def batch(self, batch_size: int, refill: Callable[[], None]) -> Batch | None:
        """The next rows, full unless the documents run out; None when there were none left to start with.

        refill is called first, and whenever there are fewer documents than before, to keep as many as its owner wants.
        """
        parts: list[memoryview] = []  # BOS, ids, BOS, ids, ...
        positions = np.empty((batch_size, self._size - 1), np.int64)
        positions[:] = self._positions
        refill()
        for b in range(batch_size):
            for at in self._row(parts, refill):
                positions[b, at:] = self._positions[: self._size - 1 - at]
        if parts[0] is not self._bos:
            return None
        return shift(np.frombuffer(b"".join(parts), np.int32).reshape(batch_size, -1), positions, self._bos[0])

    def _row(self, parts: list[memoryview], refill: Callable[[], None]) -> list[int]:
        """Append one row's pieces, each BOS and ids, or IGNORE for want of documents; gives where the second ... start."""
        buffer, room, starts = self.buffer, self._size, []
        key = buffer.oldest()
        while key:
            parts.append(self._bos)
            if room == 1:  # the BOS alone: what follows it is not read, and the document stays whole
                return starts
            ids, size = buffer.pop(key), key[0]
            if size > room and self.carry:
                buffer.add((size - room + 1, *key[1:-1], key[-1] + room - 1), ids[room - 1 :])
                self.tokens -= room - 1
            else:
                self.tokens -= size
                refill()
            if size >= room:
                self.dropped += 0 if self.carry else size - room
                parts.append(ids[: room - 1])
                return starts
            parts.append(ids)
            room -= size
            starts.append(self._size - room)
            key = buffer.fitting(room) or (buffer.oldest() if self.carry or not len(buffer) else buffer.smallest())
        parts.append(self._unfilled[:room])
        return starts


def shift(tokens: np.ndarray, positions: np.ndarray, pad: int) -> Batch:
    """The Batch of rows of T + 1 tokens and T positions; IGNORE marks places at the end that are not filled."""
    inputs, targets = tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64)
    weights = torch.ones(targets.shape)
    if tokens[-1, -1] == IGNORE:
        weights[torch.from_numpy(targets == IGNORE)] = 0
        inputs[inputs == IGNORE] = pad
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), weights, torch.from_numpy(positions))
