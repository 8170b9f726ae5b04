"""Print the first batches of a shard: shapes, and what inputs and targets say (challenge 2, seconds).

Example: python scripts/show_batches.py --data data/tiny --tokenizer runs/tiny/tokenizer --n 5
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edu.config.cli import parse, run_script


@dataclass(frozen=True)
class Args:
    """Choice of shards, tokenizer and shape."""

    data: Path = Path("data/tiny")
    """Folder of parquet shards."""
    split: Literal["train", "val"] = "train"
    """Shards directly in the folder, or in its val/."""
    tokenizer: Path = Path("runs/tiny/tokenizer")
    """Folder written by scripts/train_tokenizer.py."""
    n: int = 5
    """Batches to show."""
    batch_size: int = 4
    """Rows of each, B."""
    sequence_length: int = 256
    """Tokens of each row, T."""
    head: int = 12
    """Tokens shown of the first row."""

    def __post_init__(self) -> None:
        for name in ("n", "batch_size", "sequence_length", "head"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")


def main() -> None:
    args = parse(Args)
    from edu.data.loader import stream_batches
    from edu.data.shards import list_shards
    from edu.data.tokenizer import Tokenizer

    tokenizer, shards = Tokenizer.load(args.tokenizer), list_shards(args.data, args.split)
    stream = stream_batches(shards, tokenizer, args.batch_size, args.sequence_length)
    for number, (batch, state) in zip(range(1, args.n + 1), stream, strict=False):
        starts = int((batch.positions == 0).sum())
        _, shard, group, row = state.position
        print(
            f"batch {number}: inputs {tuple(batch.inputs.shape)}, targets {tuple(batch.targets.shape)}; {starts} "
            f"document starts; read up to {shards[shard].name}, row group {group}, row {row}"
        )
        for name, ids in (("inputs", batch.inputs), ("targets", batch.targets)):
            print(f"  {name:7} {'|'.join(repr(tokenizer.decode([i]))[1:-1] for i in ids[0, : args.head].tolist())} ...")


if __name__ == "__main__":
    run_script(main)
