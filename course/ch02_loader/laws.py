"""The laws of chapter 2, and the mistakes that they must name."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from course.grading import Mutant

TITLE = "the streaming dataloader"
PROVIDES = ("stream_batches",)
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


def _targets(batches: list[Any]) -> list[int]:
    """All targets in order, without the marks at which documents begin."""
    return [token for _, targets, _ in batches for token in targets.flatten().tolist() if token != 256]


def _stream(texts: list[str | None], length: int) -> list[int]:
    """The tokens of these texts, from the first, again and again, without the marks."""
    found: list[int] = []
    while len(found) < length:
        found += [token for text in texts if text for token in text.encode()]
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
    """Every document begins with bos: its first token is the target there."""
    texts = _texts(8)
    with _files(texts) as paths:
        pairs = [
            (x, y)
            for inputs, targets, _ in _take(m, paths, 3)
            for x, y in zip(inputs.flatten().tolist(), targets.flatten().tolist(), strict=True)
            if y != 256
        ]
    starts, at = set[int](), 0
    while at < len(pairs):
        starts.add(at)
        at += len(texts[(len(starts) - 1) % len(texts)] or "")
    for i in sorted(starts):
        seen = _show([x for x, _ in pairs[max(0, i - 3) : i + 1]])
        assert pairs[i][0] == 256, (
            f"the first token of document {sorted(starts).index(i)} is predicted after {seen!r}, expected bos"
        )


def law_every_token_once(m: Any) -> None:
    """Every token of a text is a target once, in order: nothing is lost between rows or batches."""
    texts = _texts(20)
    with _files(texts) as paths:
        found = _targets(_take(m, paths, 6))
    expected = _stream(texts, len(found))
    where = next((i for i in range(len(found)) if found[i] != expected[i]), None)
    assert where is None, (
        f"target {where} begins {_show(found[where : where + 12])!r}, the texts go on with "
        f"{_show(expected[where : where + 12])!r}: is a token dropped where a row or a batch ends?"
    )


def law_files_in_order(m: Any) -> None:
    """All files are read, in the order given; empty texts and None are skipped."""
    first, second = [*_texts(4), None, ""], _texts(4, file=1)
    with _files(first, second) as paths:
        batches = _take(m, paths, 12)
    found, marks = _targets(batches), [t for _, targets, _ in batches for t in targets.flatten().tolist()]
    expected = _stream(first + second, len(found))
    assert found == expected, f"the targets are {_show(found)!r}, expected {_show(expected)!r}"
    doubled = sum(a == b == 256 for a, b in pairwise(marks))
    assert not doubled, "two marks follow each other: an empty text became a document"


def law_endless(m: Any) -> None:
    """After the last text comes the first again."""
    texts = _texts(3)
    with _files(texts) as paths:
        batches = _take(m, paths, 10)
    assert len(batches) == 10, f"the stream ended after {len(batches)} batches"
    found = _targets(batches)
    expected = _stream(texts, len(found))
    assert found == expected, f"the targets are {_show(found)!r}, expected {_show(expected)!r}"


def law_ranks(m: Any) -> None:
    """Of N processes each reads other texts, and together they read all, in every epoch."""
    texts = _texts(20)
    with _files(texts[:10], texts[10:]) as paths:
        for rank in range(3):
            found = _targets(_take(m, paths, 30, rank=rank, world_size=3))
            own = texts[rank::3]
            expected = _stream(own, len(found))
            where = next((i for i in range(len(found)) if found[i] != expected[i]), None)
            assert where is None, (
                f"process {rank} of 3, target {where}: {_show(found[where : where + 12])!r}, expected "
                f"{_show(expected[where : where + 12])!r}; its texts are {own}, in every epoch"
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
        stream = m.stream_batches(paths, tokenizer, B, T)
        next(stream)
        held = pa.total_allocated_bytes() - before
        assert held < size / 4, (
            f"{held:,} bytes are held after the first batch, the whole file has {size:,}: read it in parts"
        )


MUTANTS = [
    Mutant("not shifted", "buffer[1 : B * T + 1]", "buffer[: B * T]", "shift"),
    Mutant("a token is lost after each batch", "buffer = buffer[B * T :]", "buffer = buffer[B * T + 1 :]", "every_token_once"),
    Mutant("the rest of a document is lost", "buffer = buffer[B * T :]", "buffer = buffer[B * T : B * T + 1]", "every_token_once"),
    Mutant("no bos", "[tokenizer.bos, *tokenizer.encode(text)]", "tokenizer.encode(text)", "bos"),
    Mutant("every process reads all", "number < read or number % world_size != rank or", "number < read or", "ranks"),
    Mutant("the buffer is not saved", '{"read": read, "buffer": list(buffer)}', '{"read": read, "buffer": []}', "resume"),
    Mutant("the present text is read again", "read = number + 1", "read = number", "resume"),
    Mutant("only the first file", "for path in paths:", "for path in paths[:1]:", "files_in_order"),
    Mutant("the whole file at once", 'pq.ParquetFile(path).iter_batches(batch_size=64, columns=["text"])', '[pq.read_table(path, columns=["text"])]', "lazy"),
    Mutant("empty texts become documents", "!= rank or not text:", "!= rank or text is None:", "files_in_order"),
    Mutant("after one epoch nothing comes", "        read = 0  # the next epoch\n", "        return\n", "endless"),
    Mutant("the state is handed out and changed later", "buffer = buffer[B * T :]  # the last target is the next first input\n                yield inputs, targets, {\"read\": read, \"buffer\": list(buffer)}", "del buffer[: B * T]\n                yield inputs, targets, {\"read\": read, \"buffer\": buffer}", "state_stays"),
    Mutant("32-bit numbers", "torch.tensor(buffer[: B * T])", "torch.tensor(buffer[: B * T], dtype=torch.int32)", "shape"),
]  # fmt: skip
