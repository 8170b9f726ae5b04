"""The laws of chapter 2, and the mistakes that they must name."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from course.grading import Mutant

TITLE = "the streaming dataloader"
PROVIDES = ("read_texts", "stream_batches")
B, T = 2, 8


class Bytes:
    """A tokenizer of bytes that counts the texts it was given."""

    bos = 256

    def __init__(self) -> None:
        self.encoded = 0

    def encode(self, text: str) -> list[int]:
        self.encoded += 1
        return list(text.encode())


def _texts(number: int, file: int = 0) -> list[str | None]:
    """Texts of different lengths; each says its file and number."""
    return [f"{file}-{i}:" + "abcdefghij" * (i % 4) for i in range(number)]


@contextmanager
def _files(*texts: list[str | None], rows: int = 5) -> Iterator[list[Path]]:
    """Parquet files of these texts, in row groups of so many rows."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"shard_{i:05d}.parquet" for i in range(len(texts))]
        for path, column in zip(paths, texts, strict=True):
            pq.write_table(pa.table({"text": pa.array(column, pa.string())}), path, row_group_size=rows)
        yield paths


def _take(m: Any, paths: list[Path], number: int, **settings: Any) -> list[Any]:
    return list(islice(m.stream_batches(paths, Bytes(), B, T, **settings), number))


def _stream(texts: list[str | None], length: int) -> list[int]:
    """The stream of tokens that these texts make, from the first, again and again."""
    found: list[int] = []
    while len(found) < length:
        found += [token for text in texts if text for token in (256, *text.encode())]
    return found[:length]


def _show(tokens: list[int]) -> str:
    return "".join("<bos>" if token == 256 else chr(token) for token in tokens)


def law_shape(m: Any) -> None:
    """Inputs and targets are (B, T) of int64."""
    with _files(_texts(20)) as paths:
        for inputs, targets, _ in _take(m, paths, 3):
            assert tuple(inputs.shape) == tuple(targets.shape) == (B, T), (
                f"inputs {tuple(inputs.shape)}, targets {tuple(targets.shape)}"
            )
            assert inputs.dtype == targets.dtype == torch.int64, f"inputs {inputs.dtype}, targets {targets.dtype}"


def law_shift(m: Any) -> None:
    """In every row the target is the next input."""
    with _files(_texts(20)) as paths:
        for inputs, targets, _ in _take(m, paths, 3):
            for row, (x, y) in enumerate(zip(inputs.tolist(), targets.tolist(), strict=True)):
                assert x[1:] == y[:-1], f"row {row}: inputs {_show(x)!r}, targets {_show(y)!r}" + (
                    "; they are the same: not shifted" if x == y else ""
                )


def law_bos(m: Any) -> None:
    """Every document begins with bos."""
    texts = _texts(4)
    with _files(texts) as paths:
        inputs, _, _ = _take(m, paths, 1)[0]
        found = inputs.flatten().tolist()
        expected = _stream(texts, B * T)
        assert found[0] == 256, f"the stream begins with {_show(found)!r}, expected {_show(expected)!r}"
        assert found.count(256) == expected.count(256), (
            f"the first inputs are {_show(found)!r}, expected {_show(expected)!r}"
        )


def law_every_token_once(m: Any) -> None:
    """Every token but the very first is a target once, in order: nothing is lost between rows or batches."""
    texts = _texts(20)
    with _files(texts) as paths:
        batches = _take(m, paths, 6)
    found = [token for _, targets, _ in batches for token in targets.flatten().tolist()]
    expected = _stream(texts, len(found) + 1)[1:]
    where = next((i for i in range(len(found)) if found[i] != expected[i]), None)
    assert where is None, (
        f"target {where} (batch {where // (B * T)}) is {_show(found[where : where + 12])!r}, the stream goes on with "
        f"{_show(expected[where : where + 12])!r}: is a token dropped where a row or a batch ends?"
    )


def law_files_in_order(m: Any) -> None:
    """All files are read, in the order given; empty texts and None are skipped."""
    first, second = [*_texts(4), None, ""], _texts(4, file=1)
    with _files(first, second) as paths:
        found = list(m.read_texts(paths))
        expected = [text for text in first + second if text]
        assert found == expected, f"the texts are {found}, expected {expected}"


def law_endless(m: Any) -> None:
    """After the last text comes the first again."""
    texts = _texts(3)
    with _files(texts) as paths:
        batches = _take(m, paths, 10)
        assert len(batches) == 10, f"the stream ended after {len(batches)} batches"
    found = [token for inputs, _, _ in batches for token in inputs.flatten().tolist()]
    expected = _stream(texts, len(found))
    assert found == expected, f"the inputs are {_show(found)!r}, expected {_show(expected)!r}"


def law_ranks(m: Any) -> None:
    """Of N processes each reads other texts, and together they read all."""
    texts = _texts(20)
    with _files(texts[:10], texts[10:]) as paths:
        for rank in range(3):
            tokens = [
                t for inputs, _, _ in _take(m, paths, 60, rank=rank, world_size=3) for t in inputs.flatten().tolist()
            ]
            documents = _show(tokens).split("<bos>")[1:15]
            expected = [texts[number % 20] for number in range(rank, 20 * 3, 3)][:14]
            assert documents == expected, (
                f"process {rank} of 3 reads {documents}, expected {expected}: every third text, counted on through the epochs"
            )


def law_resume(m: Any) -> None:
    """From any state the stream goes on with the very next batch, in the second epoch too; a state is plain JSON."""
    for rank, world_size in ((0, 1), (1, 2)):
        with _files(_texts(5), _texts(4, file=1)) as paths:
            batches = _take(m, paths, 14, rank=rank, world_size=world_size)
            for i in range(13):
                state = json.loads(json.dumps(batches[i][2]))
                (following,) = _take(m, paths, 1, rank=rank, world_size=world_size, state=state)
                found, expected = following[0].flatten().tolist(), batches[i + 1][0].flatten().tolist()
                assert found == expected, (
                    f"process {rank} of {world_size}, resumed after batch {i}: {_show(found)!r}, expected {_show(expected)!r}"
                )


def law_state_stays(m: Any) -> None:
    """A state that was handed out does not change while the stream goes on."""
    with _files(_texts(20)) as paths:
        stream = m.stream_batches(paths, Bytes(), B, T)
        _, _, state = next(stream)
        before = json.dumps(state)
        next(stream), next(stream)
        assert json.dumps(state) == before, "the state of batch 0 was changed by a later batch: hand out a copy"


def law_lazy(m: Any) -> None:
    """Only what a batch needs is read: a shard is far larger than memory."""
    tokenizer, texts = Bytes(), [f"{i}:" + "abcdefghij" * 40 for i in range(20_000)]
    with _files(texts, rows=100) as paths:
        next(m.stream_batches(paths, tokenizer, B, T))
        assert tokenizer.encoded < 2000, (
            f"{tokenizer.encoded:,} of 20,000 texts were tokenized for a batch of {B * T} tokens"
        )
        size, before = pq.ParquetFile(paths[0]).metadata.row_group(0).total_byte_size * 200, pa.total_allocated_bytes()
        read = m.read_texts(paths)
        next(read)
        held = pa.total_allocated_bytes() - before
        assert held < size / 4, (
            f"{held:,} bytes are held after the first text, the whole file has {size:,}: read it in parts"
        )


MUTANTS = [
    Mutant("not shifted", "buffer[1 : B * T + 1]", "buffer[: B * T]", "shift"),
    Mutant("a token is lost after each batch", "buffer = buffer[B * T :]", "buffer = buffer[B * T + 1 :]", "every_token_once"),
    Mutant("the rest of a document is lost", "buffer = buffer[B * T :]", "buffer = buffer[B * T : B * T + 1]", "every_token_once"),
    Mutant("no bos", "[tokenizer.bos, *tokenizer.encode(text)]", "tokenizer.encode(text)", "bos"),
    Mutant("every process reads all", "number < read or number % world_size != rank", "number < read", "ranks"),
    Mutant("the count begins anew in every epoch", "if not found:", "numbers, read = count(), 0\n        if not found:", "ranks"),
    Mutant("the buffer is not saved", '{"read": read, "buffer": list(buffer)}', '{"read": read, "buffer": []}', "resume"),
    Mutant("the present text is read again", "read = number + 1", "read = number", "resume"),
    Mutant("only the first file", "for path in paths:", "for path in paths[:1]:", "files_in_order"),
    Mutant("the whole file at once", 'pq.ParquetFile(path).iter_batches(batch_size=64, columns=["text"])', '[pq.read_table(path, columns=["text"])]', "lazy"),
    Mutant("empty texts become documents", "to_pylist() if text)", "to_pylist() if text is not None)", "files_in_order"),
    Mutant("the state is handed out and changed later", "buffer = buffer[B * T :]  # the last target is the next first input\n                yield inputs, targets, {\"read\": read, \"buffer\": list(buffer)}", "del buffer[: B * T]\n                yield inputs, targets, {\"read\": read, \"buffer\": buffer}", "state_stays"),
    Mutant("32-bit numbers", "torch.tensor(buffer[: B * T])", "torch.tensor(buffer[: B * T], dtype=torch.int32)", "shape"),
]  # fmt: skip
