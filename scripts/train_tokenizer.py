"""Train a tokenizer on parquet shards. Example: python scripts/train_tokenizer.py --data data/tiny --vocab-size 1024"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edu.config.cli import parse, run_script


@dataclass(frozen=True)
class Args:
    data: Path = Path("data/tiny")
    """Folder of parquet shards with a column `text`; the validation split is its `val/`."""
    vocab_size: int = 1024
    """Ids in all, the ten special tokens included."""
    max_chars: float = 2e9
    """Read at most so many characters of the training split."""
    val_chars: float = 1e7
    """Measure compression on at most so many characters of the validation split."""
    out: Path = Path("runs/tiny/tokenizer")
    """Folder to write, for AutoTokenizer and for the other scripts."""


def first(texts: Iterator[str], max_chars: float) -> Iterator[str]:
    """Yield texts until they hold max_chars characters or more."""
    chars = 0
    while chars < max_chars and (text := next(texts, None)) is not None:
        chars += len(text)
        yield text


def main() -> None:
    args = parse(Args)
    from rich.progress import track

    from edu.data.compression import SAMPLES, bytes_per_token, peers
    from edu.data.shards import list_shards
    from edu.data.sources import read_texts
    from edu.data.train_tokenizer import train_tokenizer

    train, val = list_shards(args.data, "train"), list_shards(args.data, "val")
    texts = track(first(read_texts(train), args.max_chars), "reading text", disable=not sys.stdout.isatty())
    tokenizer = train_tokenizer(texts, args.vocab_size)
    tokenizer.save(args.out)
    print(f"{args.out}: {tokenizer.vocab_size} tokens, learned from {len(train)} shards of {args.data}")
    columns = {"ours": tokenizer.encode} | {name: peer.encode_ordinary for name, peer in peers().items()}
    rows = {"validation split": list(first(read_texts(val), args.val_chars))} | {
        name: [text] for name, text in SAMPLES.items()
    }
    print(f"{'bytes per token':17}" + "".join(f"{name:>12}" for name in columns))
    for name, texts in rows.items():
        print(f"{name:17}" + "".join(f"{bytes_per_token(encode, texts):12.2f}" for encode in columns.values()))


if __name__ == "__main__":
    run_script(main)
