"""The plain solution of chapter 2: texts, tokens, batches, and where one stands."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor


def read_rows(paths: list[Path]) -> Iterator[str | None]:
    for path in paths:
        for part in pq.ParquetFile(path).iter_batches(batch_size=64, columns=["text"]):
            yield from part.column(0).to_pylist()


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
    while True:
        found = False
        for number, text in enumerate(read_rows(paths)):
            found = found or bool(text)
            if number < read or number % world_size != rank or not text:
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
        read = 0  # the next epoch
