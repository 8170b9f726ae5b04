"""Train a tokenizer on parquet shards. Example: python scripts/train_tokenizer.py --data data/tiny --vocab-size 1024"""

import sys
from collections.abc import Iterator, Sequence
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


def read_texts(shards: Sequence[Path], max_chars: float) -> Iterator[str]:
    """The documents of the shards in order, a small record batch in memory at a time; null and empty ones left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    chars = 0
    for shard in shards:
        try:
            with pq.ParquetFile(shard) as file:
                if "text" not in file.schema_arrow.names:
                    raise ValueError(f"no column `text`, only {', '.join(file.schema_arrow.names)}")
                for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                    for text in batch.column(0).cast(pa.large_string()).to_pylist():
                        if text and chars < max_chars:
                            chars += len(text)
                            yield text
                    if chars >= max_chars:
                        return
        except (pa.ArrowException, ValueError, OSError) as error:
            raise ValueError(f"{shard}: {error}") from error


def main() -> None:
    args = parse(Args)
    from rich.progress import track

    from edu.data.compression import SAMPLES, bytes_per_token, peers
    from edu.data.shards import list_shards
    from edu.data.tokenizer import train_tokenizer

    train, val = list_shards(args.data, "train"), list_shards(args.data, "val")
    texts = track(read_texts(train, args.max_chars), "reading text", disable=not sys.stdout.isatty())
    tokenizer = train_tokenizer(texts, args.vocab_size)
    tokenizer.save(args.out)
    print(f"{args.out}: {tokenizer.vocab_size} tokens, learned from {len(train)} shards of {args.data}")
    columns = {"ours": tokenizer.encode} | {name: peer.encode_ordinary for name, peer in peers().items()}
    rows = {"validation split": list(read_texts(val, args.val_chars))} | {
        name: [text] for name, text in SAMPLES.items()
    }
    print(f"{'bytes per token':17}" + "".join(f"{name:>12}" for name in columns))
    for name, texts in rows.items():
        print(f"{name:17}" + "".join(f"{bytes_per_token(encode, texts):12.2f}" for encode in columns.values()))


if __name__ == "__main__":
    run_script(main)
