"""Best-fit packing of token sequences into rows of one length, and Batch, the form in which every stage trains.

The algorithm: put the largest sequence that fits into the room that is left, until none does. Lists (conversations,
rollouts, problems) go through `pack_rows`, which never cuts one. A stream of documents goes through `StreamPacker`, which
cuts one where nothing fits, so that every row is full, and puts the rest back.

B batch, T sequence length. A row of T inputs and T targets, shifted by one, comes from T + 1 tokens.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

IGNORE = -1
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
        """Return the same batch on a device."""
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))

    def split(self, parts: int) -> "list[Batch]":
        """Divide the rows into as many smaller batches, or one a row where there are fewer rows."""
        return [Batch(*rows) for rows in zip(*(tensor.chunk(parts) for tensor in vars(self).values()), strict=True)]


@dataclass(frozen=True)
class TrainingExample:
    """A token sequence with its loss mask and weights; n + 1 tokens give n inputs and n targets."""

    ids: Sequence[int] | np.ndarray
    mask: Sequence[int] | np.ndarray
    """1 where the token is a target to learn, 0 where it is only read; as long as ids."""
    weight: float | np.ndarray = 1.0
    """Weight of the targets: one number (an advantage), or one for each of ids."""
    positions: np.ndarray | None = None
    """Positions of ids within the document, where they are not 0, 1, 2, ...: see edu.model.masks.document_mask."""


class BestFit:
    """A buffer of sized items that finds the largest that fits a room, and the oldest, by bisection.

    Keys are unique tuples that begin with the size; among equal sizes the greatest key is found first. An item larger
    than `limit` fits no room that will be asked for: it is found by its age only, and costs no sorting.

    >>> buffer = BestFit()
    >>> for size, word in [(5, "hello"), (2, "hi"), (3, "hey")]:
    ...     buffer.add((size,), word)
    >>> buffer.fitting(4), buffer.fitting(1), buffer.oldest(), buffer.pop((3,)), len(buffer.items)
    ((3,), None, (5,), 'hey', 2)
    """

    def __init__(self, limit: float = inf) -> None:
        self.limit = limit
        self.items: dict[Key, Any] = {}  # in order of age
        self._sorted: list[Key] = []

    def add(self, key: Key, item: Any) -> None:
        """Put an item in, as the youngest."""
        assert key not in self.items, f"two items {key}"
        if key[0] <= self.limit:
            insort(self._sorted, key)
        self.items[key] = item

    def fitting(self, room: int) -> Key | None:
        """Return the key of the largest item of at most `room`."""
        at = bisect_left(self._sorted, (room + 1,))
        return self._sorted[at - 1] if at else None

    def oldest(self) -> Key | None:
        """Return the key of the item that has waited longest."""
        return next(iter(self.items), None)

    def pop(self, key: Key) -> Any:
        """Take an item out."""
        if key[0] <= self.limit:
            del self._sorted[bisect_left(self._sorted, key)]
        return self.items.pop(key)


def pack_rows(items: Sequence[TrainingExample], sequence_length: int, window: int = 4096) -> list[list[int]]:
    """Pack examples, none cut, into rows of at most sequence_length inputs; return each row as indices into items.

    1. Keep the next `window` examples at hand. Up to so many in all, this is best-fit decreasing (at most 11/9 of the
       fewest rows: Johnson et al., SIAM J. Comput. 3, 1974); beyond, rows stay near the order of the list.
    2. Fill a row: the largest that fits, again and again; among equals the first of the list.

    Nothing is drawn at random. An example of more than sequence_length + 1 tokens is the caller's to leave out or shorten.

    >>> pack_rows([TrainingExample([1] * n, [1] * n) for n in (3, 5, 4, 3)], sequence_length=6)
    [[1, 0], [2, 3]]
    """
    buffer, rows, coming = BestFit(), [], 0
    while coming < len(items) or buffer.items:
        while coming < len(items) and len(buffer.items) < window:
            size = len(items[coming].ids) - 1
            assert 1 <= size <= sequence_length, (
                f"example {coming} has {size + 1} tokens; a row takes 2 to {sequence_length + 1}"
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
    """Lay out rows of examples as a Batch: inputs ids[:-1], targets ids[1:] where their mask is 1.

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
        for example in row:
            ids, mask = np.asarray(example.ids, np.int64), np.asarray(example.mask).astype(bool)
            assert len(ids) == len(mask), f"{len(ids)} ids, {len(mask)} of mask"
            part = slice(at, at := at + len(ids) - 1)
            assert at <= T, f"row {b} has {at} inputs or more; it takes {T}"
            inputs[b, part] = ids[:-1]
            targets[b, part] = np.where(mask, ids, IGNORE)[1:]
            weights[b, part] = np.where(mask, example.weight, 0.0)[1:]
            positions[b, part] = np.arange(len(ids) - 1) if example.positions is None else example.positions[:-1]
        positions[b, at:] = np.arange(T - at)
    return Batch(*map(torch.from_numpy, (inputs, targets, weights, positions)))


class StreamPacker:
    """Fill rows of T + 1 tokens from a buffer of documents, leaving no room in any row.

    1. A row starts with the document that has waited longest, so none waits forever.
    2. The largest that fits whole follows, until none fits.
    3. Then the one that has waited longest is cut to fill the room, and its rest goes back as the youngest.

    Each document, and each rest, takes one token more than its own: the BOS it starts with. So every token of a
    document is a target exactly once, and every document's end is followed by a BOS to predict, unless the row ends
    there. A buffer of one document is concatenation in the order of the stream.
    """

    def __init__(self, bos: int, sequence_length: int) -> None:
        self.size = sequence_length + 1
        self.buffer = BestFit(limit=self.size)
        self.tokens = 0  # waiting in the buffer, BOS included
        self._bos = np.array([bos], np.uint32)

    def add(self, origin: Key, ids: np.ndarray) -> None:
        """Put in a document. origin: where it comes from, unique; its last number is the first token's offset there."""
        assert len(ids), f"an empty document at {origin}"
        self.buffer.add((1 + len(ids), *origin), ids)
        self.tokens += 1 + len(ids)

    def rows(self, batch_size: int, refill: Callable[[], None]) -> tuple[np.ndarray, np.ndarray] | None:
        """Return tokens (B, T + 1) and positions (B, T) of the next rows; None when no documents are left.

        Rows are full unless the documents run out: IGNORE fills the rest. refill is called first, and whenever there are
        fewer documents than before, to keep as many as its owner wants.
        """
        parts: list[np.ndarray] = []  # BOS, ids, BOS, ids, ...
        count = np.arange(self.size - 1)
        positions = np.tile(count, (batch_size, 1))
        refill()
        if not self.buffer.items:
            return None
        for b in range(batch_size):
            for start in self._row(parts, refill):
                positions[b, start:] = count[: len(count) - start]
        return np.concatenate(parts, dtype=np.int64).reshape(batch_size, self.size), positions

    def _row(self, parts: list[np.ndarray], refill: Callable[[], None]) -> list[int]:
        """Append one row's documents, each BOS and ids; return where the second and the following start."""
        buffer, room, starts = self.buffer, self.size, []
        key = buffer.oldest()
        while key:
            parts.append(self._bos)
            if room == 1:  # the BOS alone: the token after it is not read, and the document stays whole
                return starts
            ids, size = buffer.pop(key), key[0]
            if size > room:
                buffer.add((size - room + 1, *key[1:-1], key[-1] + room - 1), ids[room - 1 :])
                self.tokens -= room - 1
            else:
                self.tokens -= size
                refill()
            parts.append(ids[: room - 1])
            room -= size
            if room <= 0:
                return starts
            starts.append(self.size - room)
            key = buffer.fitting(room) or buffer.oldest()
        parts.append(np.full(room, IGNORE, np.int64))
        return starts
