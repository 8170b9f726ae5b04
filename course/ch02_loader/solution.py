"""The plain solution of chapter 2: texts, tokens, batches, and where one stands."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor


def read_texts(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        for part in pq.ParquetFile(path).iter_batches(batch_size=64, columns=["text"]):
            yield from (text for text in part.column(0).to_pylist() if text)


def stream_batches(
    paths: list[Path],
    tokenizer: Any,
    batch_size: int,
    sequence_length: int,
    rank: int = 0,
    world_size: int = 1,
    state: dict[str, Any] | None = None,
) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    B, T = batch_size, sequence_length
    read, buffer = (state["read"], list(state["buffer"])) if state else (0, [])
    numbers = count()  # of all texts, through all epochs
    while True:
        found = False
        for text in read_texts(paths):
            found, number = True, next(numbers)
            if number < read or number % world_size != rank:
                continue
            buffer += [tokenizer.bos, *tokenizer.encode(text)]
            read = number + 1
            while len(buffer) > B * T:
                inputs = torch.tensor(buffer[: B * T]).view(B, T)
                targets = torch.tensor(buffer[1 : B * T + 1]).view(B, T)
                buffer = buffer[B * T :]  # the last target is the next first input
                yield inputs, targets, {"read": read, "buffer": list(buffer)}
        if not found:
            raise ValueError(f"no text in {len(paths)} files")
