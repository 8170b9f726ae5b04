"""Laws of the dataloader: resuming is exact, ranks share the data set, nothing is lost, odd data is named or counted."""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from edu.data.loader import LoaderState, stream_batches, validation_batches
from edu.data.packing import IGNORE, Batch
from edu.data.shards import list_shards
from edu.data.tokenizer import Tokenizer

BOS = 256


class ByteTokenizer:
    """Ids are bytes."""

    bos = BOS

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]


TOKENIZER = ByteTokenizer()


def write(path: Path, texts: Sequence[str | None], rows_a_group: int = 5, kind: pa.DataType | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    column = pa.array(texts, kind or pa.string())
    table = pa.table({"id": list(range(len(texts))), "text": column, "note": ["x"] * len(texts)})
    pq.write_table(table, path, row_group_size=rows_a_group)
    return path


def texts_of(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Texts that are all different and say where they begin and end."""
    rng = np.random.default_rng(seed)
    return [f"<{seed}.{i}:" + "abcdefgh"[i % 8] * int(n) + ">" for i, n in enumerate(rng.integers(0, longest, count))]


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / f"shard_{i:05d}.parquet", texts_of(count, i)) for i, count in enumerate([17, 5, 11])]


def all_texts(paths: list[Path]) -> list[str]:
    return [text for path in paths for text in pq.read_table(path)["text"].to_pylist() if text]


def tokens_of(batches: list[Batch]) -> Counter[int]:
    """The targets, BOS and padding left out: each token of a document is a target exactly once."""
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    return Counter(targets[(targets != IGNORE) & (targets != BOS)].tolist())


def bytes_of(texts: Sequence[str]) -> Counter[int]:
    return Counter(byte for text in texts for byte in text.encode())


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (2, 1), (3, 0), (7, 6)])
@pytest.mark.parametrize(("buffer_size", "T"), [(6, 24), (1, 24), (1000, 100)])
def test_resuming_from_batch_k_gives_batch_k_plus_1(
    shards: list[Path], world_size: int, rank: int, buffer_size: int, T: int
) -> None:
    options = {"epochs": 3, "buffer_size": buffer_size}
    whole = list(stream_batches(shards, TOKENIZER, 2, T, rank, world_size, **options))
    assert len(whole) > 2
    for k, (_, saved) in enumerate(whole):
        state = LoaderState.from_dict(json.loads(json.dumps(saved.to_dict())))
        rest = list(stream_batches(shards, TOKENIZER, 2, T, rank, world_size, state, **options))
        assert len(rest) == len(whole) - k - 1
        for (batch, state_a), (resumed, state_b) in zip(whole[k + 1 :], rest, strict=True):
            assert same(batch, resumed)
            assert state_a == state_b


def test_resuming_is_exact_where_the_buffer_is_bounded_by_its_tokens(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents of ten rows: what is cut off leaves room in the buffer, and none of its documents."""
    monkeypatch.setattr("edu.data.loader.BUFFER_TOKENS", 100)
    whole = list(stream_batches(shards, TOKENIZER, 4, 6, epochs=2))
    assert max(len(state.buffer) for _, state in whole) < 12
    for k, (_, saved) in enumerate(whole):
        rest = list(stream_batches(shards, TOKENIZER, 4, 6, state=saved, epochs=2))
        assert len(rest) == len(whole) - k - 1
        assert all(same(a, b) and s == t for (a, s), (b, t) in zip(whole[k + 1 :], rest, strict=True))


def test_states_of_an_endless_stream_resume_across_epochs(shards: list[Path]) -> None:
    stream = stream_batches(shards, TOKENIZER, 4, 32)
    whole = [next(stream) for _ in range(60)]
    assert whole[-1][1].position[0] >= 3
    for k in range(0, 59, 7):
        assert same(next(stream_batches(shards, TOKENIZER, 4, 32, state=whole[k][1]))[0], whole[k + 1][0])


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 20, 40])
@pytest.mark.parametrize("rows_a_group", [1, 4, 1000])
def test_ranks_together_see_the_data_set_once_an_epoch(tmp_path: Path, world_size: int, rows_a_group: int) -> None:
    """With more ranks than documents (26), too: those left without one say so at once."""
    paths = [write(tmp_path / f"{i}.parquet", texts_of(13, i), rows_a_group) for i in range(2)]
    for rank in range(26, world_size):
        with pytest.raises(ValueError, match=f"process {rank} of {world_size} finds no text in the 26 rows"):
            next(stream_batches(paths, TOKENIZER, 2, 16, rank, world_size))
    for epochs in (1, 2):
        ranks = [
            list(stream_batches(paths, TOKENIZER, 2, 16, rank, world_size, epochs=epochs))
            for rank in range(min(world_size, 26))
        ]
        seen = sum((tokens_of([batch for batch, _ in batches]) for batches in ranks), Counter())
        assert seen == Counter({byte: epochs * n for byte, n in bytes_of(all_texts(paths)).items()})
        documents = [batches[-1][1].documents for batches in ranks]
        assert sum(documents) == 26 * epochs
        assert max(documents) - min(documents) <= epochs


def test_two_ranks_share_one_shard_of_one_row_group(tmp_path: Path) -> None:
    path = write(tmp_path / "one.parquet", texts_of(10), rows_a_group=100)
    streams = [stream_batches([path], TOKENIZER, 2, 16, rank, 2) for rank in range(2)]
    a, b = (next(stream)[0] for stream in streams)
    assert not same(a, b)


def test_a_rank_without_documents_is_an_error_and_no_hang(tmp_path: Path) -> None:
    path = write(tmp_path / "few.parquet", ["one", "two", ""])
    assert next(stream_batches([path], TOKENIZER, 1, 8, 1, 3))
    for rank, world_size in [(2, 3), (3, 4)]:
        with pytest.raises(ValueError, match=f"process {rank} of {world_size} finds no text in the 3 rows"):
            next(stream_batches([path], TOKENIZER, 1, 8, rank, world_size))
    with pytest.raises(ValueError, match="no rows in 0 shards"):
        stream_batches([], TOKENIZER, 1, 8)


@pytest.mark.slow
def test_more_processes_than_documents_end_with_one_line_and_no_hang(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "data" / "a.parquet", ["The only document there is. " * 9])
    write(tmp_path / "data" / "val" / "b.parquet", ["The cat sees the dog."])
    tokenizer.save(tmp_path / "tokenizer")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    paths = [f"--{name}={tmp_path / name}" for name in ("data", "tokenizer", "out")]
    command = [*launch, "scripts/pretrain.py", *paths, "--layers=1", "--channels=32", "--sequence-length=32"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith("error: process 1 of 2 finds no text in the 1 rows of 1 shards")


def test_rows_are_full_and_positions_restart_at_each_bos(shards: list[Path]) -> None:
    stream = stream_batches(shards, TOKENIZER, 4, 32, buffer_size=10)
    for _ in range(30):
        batch, _ = next(stream)
        assert batch.inputs.shape == batch.targets.shape == batch.weights.shape == batch.positions.shape == (4, 32)
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        assert torch.equal(batch.inputs == BOS, batch.positions == 0)
        assert (batch.inputs[:, 0] == BOS).all()
        assert (batch.targets != IGNORE).all()
        assert (batch.weights == 1).all()
        steps = batch.positions.diff(dim=1)
        assert ((steps == 1) | (batch.positions[:, 1:] == 0)).all()


def test_the_last_batch_is_filled_with_nothing_to_learn(shards: list[Path]) -> None:
    *_, (last, state) = stream_batches(shards, TOKENIZER, 4, 500, epochs=1)
    padding = last.targets == IGNORE
    assert padding.any()
    assert torch.equal(last.weights, (~padding).float())
    assert (last.inputs >= 0).all()
    assert state.buffer == ()


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()], ids=str)
def test_every_type_of_strings_reads_the_same(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [*texts_of(20), None, "", *texts_of(3)]
    plain, other = write(tmp_path / "a.parquet", texts), write(tmp_path / "b.parquet", texts, kind=kind)
    for (a, _), (b, _) in zip(*(stream_batches([p], TOKENIZER, 2, 32, epochs=1) for p in (plain, other)), strict=True):
        assert same(a, b)


def test_null_and_empty_texts_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [None, "one", "", "two", None, "<|bos|>", "\U0001f600 é"])
    *_, (batch, state) = stream_batches([path], TOKENIZER, 1, 64, epochs=2)
    assert (state.documents, state.empty, state.corrupt) == (8, 6, 0)
    assert (batch.inputs == BOS).sum() >= 8


def test_bytes_that_are_no_utf8_do_not_end_the_run(tmp_path: Path) -> None:
    values = pa.array([b"fine", b"cut \xf0\x9f", b"surrogate \xed\xa0\x80"], pa.binary())
    text = pa.StringArray.from_buffers(3, values.buffers()[1], values.buffers()[2])
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    batches = [batch for batch, _ in stream_batches([tmp_path / "a.parquet"], TOKENIZER, 1, 64, epochs=1)]
    assert tokens_of(batches) == bytes_of(["fine", "cut \ufffd", "surrogate \ufffd\ufffd\ufffd"])


def test_a_document_of_ten_megabytes_passes_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["short", "x" * 10_000_000, "end"])
    seen = tokens_of([batch for batch, _ in stream_batches([path], TOKENIZER, 32, 2048, epochs=1)])
    assert seen == Counter({"x": 0}) | bytes_of(["short", "end"]) + Counter({ord("x"): 10_000_000})


def test_what_is_no_shard_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"txt": ["a"], "n": [1]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    for name, message in [
        ("other", r"other.parquet: needs a column 'text' of strings; has txt \(string\), n \(int64\)"),
        ("numbers", r"numbers.parquet: needs a column 'text' of strings; has text \(int64\)"),
        ("broken", "broken.parquet: not a readable parquet file"),
        ("absent", "absent.parquet: no such shard"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream_batches([tmp_path / f"{name}.parquet"], TOKENIZER, 1, 8)


def damage(path: Path, group: int) -> None:
    """Overwrite the pages of the text of one row group; the footer stays good."""
    column = pq.ParquetFile(path).metadata.row_group(group).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)


def test_a_corrupt_row_group_is_named_or_skipped_and_counted(shards: list[Path]) -> None:
    damage(shards[0], 1)
    with pytest.raises(ValueError, match=r"shard_00000.parquet: row group 1 cannot be read"):
        list(stream_batches(shards, TOKENIZER, 2, 32, epochs=1))
    with pytest.warns(UserWarning, match=r"shard_00000.parquet: row group 1 cannot be read.*5 rows are left out"):
        whole = list(stream_batches(shards, TOKENIZER, 2, 32, epochs=2, on_bad="skip", buffer_size=4))
    assert whole[-1][1].corrupt == 10
    good = texts_of(17, 0)[:5] + texts_of(17, 0)[10:] + all_texts(shards[1:])
    assert tokens_of([batch for batch, _ in whole]) == bytes_of(good * 2)
    for k in (0, 3, 10):
        with pytest.warns(UserWarning, match="left out"):
            rest = list(
                stream_batches(shards, TOKENIZER, 2, 32, epochs=2, on_bad="skip", buffer_size=4, state=whole[k][1])
            )
        assert len(rest) == len(whole) - k - 1
        assert all(same(a, b) and s == t for (a, s), (b, t) in zip(whole[k + 1 :], rest, strict=True))


def test_data_that_goes_bad_during_the_run_ends_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", texts_of(2000), rows_a_group=1000)
    stream = stream_batches([path], TOKENIZER, 2, 32, on_bad="skip", buffer_size=4)
    next(stream)
    for group in range(2):
        damage(path, group)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="process 0 of 1 finds no text"):
        list(stream)


@pytest.mark.parametrize("how", ["damaged", "removed", "cut short"])
def test_one_shard_that_goes_bad_during_the_run_is_named_or_skipped_and_counted_by_all_ranks(
    shards: list[Path], how: str
) -> None:
    """It lies behind what is read ahead of need."""
    paths = [
        write(shards[0].with_name("first.parquet"), texts_of(100, 8)),
        write(shards[1], texts_of(400, 9), 500),
        shards[2],
    ]

    def run(on_bad: Literal["error", "skip"]) -> list[list[tuple[Batch, LoaderState]]]:
        good = paths[1].read_bytes()
        options: Any = {"epochs": 1, "on_bad": on_bad, "buffer_size": 1}
        streams = [stream_batches(paths, TOKENIZER, 1, 8, rank, 2, **options) for rank in range(2)]
        found = [[next(stream)] for stream in streams]
        if how == "damaged":
            damage(paths[1], 0)
        elif how == "removed":
            paths[1].unlink()
        else:
            paths[1].write_bytes(good[: len(good) // 2])
        try:
            for stream, batches in zip(streams, found, strict=True):
                batches.extend(stream)
        finally:
            paths[1].write_bytes(good)
        return found

    with pytest.raises(ValueError, match=r"shard_00001.parquet: row group 0 cannot be read .*; download"):
        run("error")
    with pytest.warns(UserWarning, match=r"shard_00001.parquet: row group 0 cannot be read .* 200 rows are left out"):
        found = run("skip")
    assert [batches[-1][1].corrupt for batches in found] == [200, 200]
    kept = tokens_of([batch for batches in found for batch, _ in batches])
    assert kept == bytes_of(all_texts([paths[0], paths[2]]))


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_flipped_bit_is_seen_where_pages_have_checksums(tmp_path: Path, compression: str) -> None:
    table = pa.table({"text": [np.random.default_rng(i).bytes(30).hex() for i in range(200)]})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, compression=compression, use_dictionary=False, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet: row group 0 cannot be read \(.*CRC"):
        list(stream_batches([path], TOKENIZER, 2, 32, epochs=1))


def test_an_unreadable_shard_is_skipped_by_choice(shards: list[Path]) -> None:
    shards[1].write_bytes(b"no parquet")
    with pytest.warns(UserWarning, match=r"shard_00001.parquet: not a readable parquet file"):
        stream = stream_batches(shards, TOKENIZER, 2, 32, epochs=1, on_bad="skip")
    assert tokens_of([batch for batch, _ in stream]) == bytes_of(all_texts([shards[0], shards[2]]))


def test_shards_are_found_in_folders_within_and_validation_is_never_trained_on(tmp_path: Path) -> None:
    for name in ("b.parquet", "data/a.parquet", "data/deep/c.parquet", "val/v.parquet", "val/deep/w.parquet"):
        write(tmp_path / name, [name])
    assert [path.name for path in list_shards(tmp_path, "train")] == ["b.parquet", "a.parquet", "c.parquet"]
    assert [path.name for path in list_shards(tmp_path, "val")] == ["w.parquet", "v.parquet"]


def test_a_state_of_another_run_is_refused(shards: list[Path], tmp_path: Path) -> None:
    _, state = next(stream_batches(shards, TOKENIZER, 2, 16, 0, 2))
    with pytest.raises(ValueError, match="process 0 of 2, this is process 0 of 4: resume with 2 processes"):
        stream_batches(shards, TOKENIZER, 2, 16, 0, 4, state)
    with pytest.raises(ValueError, match="process 0 of 2, this is process 1 of 2"):
        stream_batches(shards, TOKENIZER, 2, 16, 1, 2, state)
    with pytest.raises(ValueError, match=r"saved with shard_00002.parquet \(.*, 11 rows\) where there is no shard"):
        stream_batches(shards[:2], TOKENIZER, 2, 16, 0, 2, state)
    with pytest.raises(ValueError, match=r"saved with no shard where there is extra.parquet"):
        stream_batches([*shards, write(tmp_path / "extra.parquet", ["a"])], TOKENIZER, 2, 16, 0, 2, state)
    write(shards[1], texts_of(6, 1))
    with pytest.raises(
        ValueError, match=r"shard_00001.parquet \(.*, 5 rows\) where there is shard_00001.parquet \(.*, 6 rows"
    ):
        stream_batches(shards, TOKENIZER, 2, 16, 0, 2, state)


def test_a_changed_tokenizer_is_seen_on_resuming(shards: list[Path]) -> None:
    class Other(ByteTokenizer):
        def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
            return super().encode_batch([text.replace("a", "aa") for text in texts])

    _, state = next(stream_batches(shards, TOKENIZER, 2, 16))
    with pytest.raises(ValueError, match="the shard or the tokenizer has changed"):
        stream_batches(shards, Other(), 2, 16, state=state)


def test_a_state_holds_for_other_batch_and_row_sizes(shards: list[Path]) -> None:
    first = stream_batches(shards, TOKENIZER, 2, 16, epochs=1)
    head = [next(first) for _ in range(5)]
    rest = [batch for batch, _ in stream_batches(shards, TOKENIZER, 3, 40, state=head[-1][1], epochs=1)]
    assert tokens_of([batch for batch, _ in head]) + tokens_of(rest) == bytes_of(all_texts(shards))


def test_a_moved_folder_resumes(shards: list[Path], tmp_path: Path) -> None:
    stream = stream_batches(shards, TOKENIZER, 2, 16)
    _, state = next(stream)
    moved = [path.rename(tmp_path / f"{path.stem}.moved") for path in shards]
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    moved = [path.rename(folder / f"{path.stem}.parquet") for path in moved]
    assert len(list(stream_batches(moved, TOKENIZER, 2, 16, state=state, epochs=1))) > 3


@pytest.mark.parametrize("max_batches", [None, 5, 1])
def test_validation_is_the_same_rows_for_any_world_size(shards: list[Path], max_batches: int | None) -> None:
    def rows(world_size: int) -> list[list[int]]:
        ranks = [
            list(validation_batches(shards, TOKENIZER, 2, 32, max_batches, r, world_size)) for r in range(world_size)
        ]
        assert len({len(batches) for batches in ranks}) == 1
        batches = [batch for group in zip(*ranks, strict=True) for batch in group]
        assert all((batch.inputs >= 0).all() and batch.inputs.shape == (2, 32) for batch in batches)
        return [row for batch in batches for row in batch.targets.tolist() if max(row) != IGNORE]

    alone = rows(1)
    assert alone == rows(2) == rows(3) == rows(50)
    assert len(alone) == {None: len(alone), 5: 10, 1: 2}[max_batches]


def test_errors_of_the_background_thread_arrive(shards: list[Path]) -> None:
    class Failing(ByteTokenizer):
        def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
            raise RuntimeError(f"out of tokens for {len(texts)} texts")

    with pytest.raises(RuntimeError, match="out of tokens"):
        next(stream_batches(shards, Failing(), 2, 16))


def test_a_closed_stream_leaves_no_thread(shards: list[Path]) -> None:
    before = set(threading.enumerate())
    stream = stream_batches(shards, TOKENIZER, 2, 16)
    next(stream)
    assert set(threading.enumerate()) - before
    del stream
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize("kept", ["stream", "[stream, sys.modules]"])
def test_an_abandoned_stream_lets_the_process_end_in_silence(shards: list[Path], kept: str) -> None:
    code = (
        "from tests.test_02_loader import TOKENIZER, stream_batches\n"
        f"stream = stream_batches({[str(path) for path in shards]!r}, TOKENIZER, 2, 16)\n"
        f"next(stream)\nimport sys\nkept = {kept}\nsys.kept = kept\nprint('done')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """60 MB of text through a buffer of 0.25 MB, a 240th: half of the text never comes on top of what a small part took."""
    text = texts_of(3000, longest=10_000)
    paths = [write(tmp_path / f"{i}.parquet", text, rows_a_group=100) for i in range(4)]
    first, process, sizes = write(tmp_path / "first.parquet", text[:100]), psutil.Process(), []
    for part, epochs in (([first], 3), (paths, 1)):
        for k, _ in enumerate(stream_batches(part, TOKENIZER, 8, 512, epochs=epochs, buffer_size=50)):
            if k % 100 == 0:
                sizes.append(process.memory_info().rss / 1e6)
        if part == [first]:
            sizes = [process.memory_info().rss / 1e6]
    assert k > 10_000
    assert max(sizes) < sizes[0] + 30, sizes[::10]


def test_a_program_that_ends_within_a_stream_ends_in_silence(shards: list[Path]) -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests'); from test_02_loader import TOKENIZER\n"
        "from edu.data.loader import stream_batches\n"
        f"stream = stream_batches({[str(path) for path in shards]!r}, TOKENIZER, 2, 32); next(stream)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
