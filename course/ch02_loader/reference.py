"""edu's loader under the names of chapter 2."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from edu.data import loader


def stream_batches(
    paths: list[Path],
    tokenizer: Any,
    batch_size: int,
    sequence_length: int,
    rank: int = 0,
    world_size: int = 1,
    state: dict[str, Any] | None = None,
) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    """Stream with a packing buffer of one document, so that the documents come in their order."""

    class Encoder:
        bos = tokenizer.bos

        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            return [tokenizer.encode(text) for text in texts]

    start = None if state is None else loader.LoaderState.from_dict(state)
    stream = loader.stream_batches(
        paths, Encoder(), batch_size, sequence_length, rank, world_size, start, buffer_size=1
    )
    for batch, position in stream:
        yield batch.inputs, batch.targets, position.to_dict()
