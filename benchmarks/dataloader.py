"""Tokens/s that reach a batch: our loader beside bare encoding and beside `datasets`, on one core (2 minutes).

Example: python benchmarks/dataloader.py --data data/fineweb-edu --tokenizer runs/d12/tokenizer

Contenders take turns of as many tokens, several rounds, in one process bound to one core; times are CPU seconds of all
threads. Each turn stands between two turns of bare encoding, and the ratio is to their mean: how fast a core is depends
on what its neighbours do. Shown are the median and all but the lowest and the highest quarter. Only text tokens that
reach a batch count, BOS and padding do not.
"""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edu.config.cli import parse, run_script

HF_BATCH = 1000  # of `map(batched=True)`, its default


@dataclass(frozen=True)
class Args:
    """Data and amounts to measure on."""

    data: Path = Path("data/tiny")
    """Folder of parquet shards."""
    tokenizer: Path = Path("runs/tiny/tokenizer")
    """Folder written by scripts/train_tokenizer.py."""
    sequence_lengths: tuple[int, ...] = (1024, 256)
    """T of the rows; a batch holds 8 rows."""
    rounds: int = 8
    """Turns of each contender."""
    tokens: int = 1_500_000
    """Of a turn: more than `datasets` maps at once; `lost` needs 10 million in all to settle."""


@dataclass
class Contender:
    """A stream of token counts, and what is seen on the way."""

    name: str
    stream: Iterator[int]
    notes: Callable[[], str] = str
    speeds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def turn(self, least: int) -> float:
        """One turn's tokens/s; work ahead of need is waited for, so that it falls in the turn it belongs to."""
        start, tokens = time.process_time(), 0
        while tokens < least:
            tokens += next(self.stream)
        seconds = 0.0
        while time.process_time() - start > seconds + 1e-3:
            seconds = time.process_time() - start
            time.sleep(0.05)
        return tokens / seconds


def raw(paths: Sequence[Path], tokenizer: Any) -> Iterator[int]:
    """The ceiling: read the text in the way that costs least, encode it, drop it."""
    import pyarrow.parquet as pq

    for path in itertools.cycle(paths):
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(128, columns=["text"], use_threads=False):
                yield sum(map(len, tokenizer.encode_batch(batch.column(0).to_pylist())))


def ours(name: str, paths: Sequence[Path], tokenizer: Any, T: int, **options: Any) -> Contender:
    """Our loader, with its packing under the options given."""
    from edu.data.loader import stream_batches

    seen = {"tokens": 0, "starts": 0, "positions": 0}

    def stream() -> Iterator[int]:
        text = 0  # tokens of a batch that are no BOS
        for number, (batch, _) in enumerate(stream_batches(paths, tokenizer, 8, T, **options)):
            if number % 64 == 0:  # looking costs as much as packing; one batch in 64 tells enough
                new = (batch.inputs.numel(), int((batch.positions == 0).sum()), int(batch.positions.sum()))
                for key, value in zip(seen, new, strict=True):
                    seen[key] += value
                text = int(8 * T * (1 - seen["starts"] / seen["tokens"]))
            yield text

    def notes() -> str:
        rows = seen["tokens"] / T
        return (
            f"{seen['starts'] / rows:5.2f} documents a row, "
            f"{seen['positions'] / seen['tokens']:4.0f} tokens of context on average"
        )

    return Contender(name, stream(), notes)


def hugging_face(paths: Sequence[Path], folder: Path, T: int) -> Iterator[int]:
    """The usual way there: streaming data set, map(tokenize), map(concatenate and cut), DataLoader."""
    from datasets import load_dataset
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer, default_data_collator

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokenize(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": tokenizer(rows["text"])["input_ids"]}

    def group(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        ids = list(itertools.chain.from_iterable(rows["input_ids"]))
        chunks = [ids[i : i + T] for i in range(0, len(ids) - T + 1, T)]
        return {"input_ids": chunks, "labels": [chunk.copy() for chunk in chunks]}

    data: Any = load_dataset("parquet", data_files=[str(path) for path in paths], split="train", streaming=True)
    data = data.map(tokenize, batched=True, batch_size=HF_BATCH, remove_columns=data.column_names)
    data = data.map(group, batched=True, batch_size=HF_BATCH)
    while True:
        for batch in DataLoader(data, batch_size=8, collate_fn=default_data_collator):
            yield int((batch["input_ids"] != tokenizer.bos_token_id).sum())


def main() -> None:
    args = parse(Args)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    import torch

    from edu.data.shards import list_shards
    from edu.data.tokenizer import Tokenizer

    torch.set_num_threads(1)
    paths, tokenizer = list_shards(args.data, "train"), Tokenizer.load(args.tokenizer)
    bare, contenders = Contender("encoding alone", raw(paths, tokenizer)), list[Contender]()
    for T in args.sequence_lengths:
        contenders += [
            ours(f"T={T} carry (default)", paths, tokenizer, T),
            ours(f"T={T} concatenate", paths, tokenizer, T, buffer_size=1),
        ]
    contenders += [Contender(f"T={T} datasets", hugging_face(paths, args.tokenizer, T)) for T in args.sequence_lengths]
    for contender in (bare, *contenders):
        next(contender.stream)
    for _ in range(args.rounds):
        bare.turn(args.tokens)  # not counted: what `datasets` leaves behind slows the next turn
        before = bare.turn(args.tokens)
        for contender in contenders:
            contender.speeds.append(contender.turn(args.tokens))
            bare.speeds.append(bare.turn(args.tokens))
            contender.ratios.append(2 * contender.speeds[-1] / (before + bare.speeds[-1]))
            before = bare.speeds[-1]
    print(f"{bare.name:24} {statistics.median(bare.speeds) / 1e3:5.0f}k tokens/s")
    for contender in contenders:
        low, middle, high = statistics.quantiles(contender.ratios, n=4)
        print(
            f"{contender.name:24} {statistics.median(contender.speeds) / 1e3:5.0f}k tokens/s, "
            f"{middle:.3f} [{low:.3f}-{high:.3f}] of encoding alone  {contender.notes()}"
        )


if __name__ == "__main__":
    run_script(main)
