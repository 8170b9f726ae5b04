"""Challenge 7: conversations become inputs and targets, packed whole into rows, in an order that the seed fixes.

The model reads a row from left to right and says at each place what comes next, so the targets are the same tokens
shifted by one. Only the assistant's are learned; the others are IGNORE (-1), which the loss leaves out:

    inputs    <|bos|>  <|user_start|>  Hi  <|user_end|>  <|assistant_start|>  Hello  !
    targets     -1           -1        -1       -1             Hello            !    <|assistant_end|>

<|assistant_start|> is an input with a target, and no target itself: the program that asks for an answer writes it. <|assistant_end|> is a
target: only a model that learned to say it stops by itself. `python scripts/show_sft_batch.py` shows a batch like this.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edu.chat.chat_format import Rendered
from edu.data.packing import Batch, TrainingExample, collate, pack_rows
from edu.data.tokenizer import Tokenizer


def training_example(rendered: Rendered, tokenizer: Tokenizer) -> TrainingExample | None:
    """Return a conversation up to the end of the assistant's last answer, None if there is no answer.

    What follows (a question that nobody answers, a call without its result) teaches nothing, and `in_turns` would glue
    another conversation behind it.
    """
    if tokenizer.assistant_end not in rendered.ids:
        return None
    end = len(rendered.ids) - rendered.ids[::-1].index(tokenizer.assistant_end)
    return TrainingExample(np.array(rendered.ids[:end], np.int32), np.array(rendered.mask[:end], np.int8))


def in_turns(
    pieces: Sequence[TrainingExample], share: float, sequence_length: int, rng: np.random.Generator
) -> list[TrainingExample]:
    """Join a share of the conversations to the one before, as its further turns, where both fit into a row.

    So the model learns to answer at any turn. Each conversation ends with an answer; all but the first lose their BOS.
    """
    talks = list[TrainingExample]()
    for piece in pieces:
        if talks and rng.random() < share and len(talks[-1].ids) + len(piece.ids) <= sequence_length + 2:
            ids, mask = (np.append(getattr(talks[-1], name), getattr(piece, name)[1:]) for name in ("ids", "mask"))
            talks[-1] = TrainingExample(ids, mask)
        else:
            talks.append(piece)
    return talks


@dataclass
class Epochs:
    """Endless rows of conversations: every epoch all of them once, packed and shuffled anew from the seed.

    Rows of step s are the rows s * n .. (s + 1) * n - 1 of the endless sequence, so the step alone says where it stands.
    """

    pieces: Sequence[TrainingExample]
    sequence_length: int
    seed: int = 0
    multi_turn: float = 0.0
    """Share of the conversations that become further turns of another one."""

    def __post_init__(self) -> None:
        self._packed: list[tuple[int, list[list[TrainingExample]]]] = []  # (first row, rows) of each epoch so far

    def rows(self, first: int, count: int) -> list[list[TrainingExample]]:
        """Return rows first .. first + count - 1."""
        return [self._row(first + i) for i in range(count)]

    def _row(self, index: int) -> list[TrainingExample]:
        while not self._packed or index >= self._packed[-1][0] + len(self._packed[-1][1]):
            epoch = len(self._packed)
            start = self._packed[-1][0] + len(self._packed[-1][1]) if epoch else 0
            rng = np.random.default_rng((self.seed, epoch))
            pieces = [self.pieces[i] for i in rng.permutation(len(self.pieces))]
            pieces = in_turns(pieces, self.multi_turn, self.sequence_length, rng)
            rows = pack_rows(pieces, self.sequence_length)
            self._packed.append((start, [[pieces[i] for i in rows[r]] for r in rng.permutation(len(rows))]))
        start, rows = next(epoch for epoch in reversed(self._packed) if epoch[0] <= index)
        return rows[index - start]


def batches_of(micro: Sequence[Sequence[Sequence[TrainingExample]]], sequence_length: int, pad: int) -> list[Batch]:
    """Collate micro-batches of rows: inputs ids[:-1], targets ids[1:] where the mask is 1 and IGNORE elsewhere.

    An empty micro-batch becomes one row with nothing to learn.

    >>> example = TrainingExample([7, 1, 50, 2, 3, 60, 61, 4], mask=[0, 0, 0, 0, 0, 1, 1, 1])
    >>> (batch,) = batches_of([[[example]]], sequence_length=8, pad=9)
    >>> print(batch.inputs, batch.targets, sep="\\n")
    tensor([[ 7,  1, 50,  2,  3, 60, 61,  9]])
    tensor([[-1, -1, -1, -1, 60, 61,  4, -1]])
    """
    return [collate(rows or [[]], sequence_length, pad) for rows in micro]
