"""Chapter 2: the streaming, tokenizing dataloader. Fill in the bodies; `make grade CHALLENGE=2` says what holds.

B rows, T tokens of a row.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as pq
import torch
from torch import Tensor


class Tokenizer(Protocol):
    """What you are given: text to ids, and the id that begins every document."""

    bos: int

    def encode(self, text: str) -> list[int]: ...


def stream_batches(
    paths: list[Path],
    tokenizer: Tokenizer,
    batch_size: int,
    sequence_length: int,
    rank: int = 0,
    world_size: int = 1,
    state: dict[str, Any] | None = None,
) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    """Yield inputs, targets, each (B, T) int64, and the state after them; without an end: after the last text the first.

    1. Read the column `text` of the parquet files, in the order given, a part of a file at a time. In every epoch this
       process takes the rows rank, rank + world_size, rank + 2 world_size, ...; empty texts and None are skipped.
    2. A document is bos and its tokens. All documents make one stream of tokens.
    3. Batch after batch, B x T tokens of the stream are the inputs, row by row, and the targets are the same one further.
       The last target of a batch is the first input of the next: every token of a text is a target once.
    4. state is plain JSON. stream_batches(..., state=state) goes on exactly where the batch that came with it ended.
    """
    raise NotImplementedError
