"""State is the number of batches; resuming replays."""

from itertools import islice

import pyarrow.parquet as pq
import torch


def rows(paths):
    for path in paths:
        with pq.ParquetFile(path) as f:
            for g in range(f.num_row_groups):
                for part in f.iter_batches(batch_size=8, row_groups=[g], columns=["text"]):
                    yield from part["text"].to_pylist()


def tokens(paths, tokenizer, rank, world_size):
    while True:
        n = 0
        for text in islice(rows(paths), rank, None, world_size):
            if text:
                n += 1
                yield tokenizer.bos
                yield from tokenizer.encode(text)
        if not n:
            raise RuntimeError("nothing to read")


def stream_batches(paths, tokenizer, batch_size, sequence_length, rank=0, world_size=1, state=None):
    done = state["batches"] if state else 0
    n = batch_size * sequence_length
    stream = islice(tokens(paths, tokenizer, rank, world_size), done * n, None)
    last = next(stream)
    while True:
        new = list(islice(stream, n))
        both = torch.tensor([last, *new])
        last = new[-1]
        done += 1
        yield both[:-1].reshape(batch_size, -1), both[1:].reshape(batch_size, -1), {"batches": done}
