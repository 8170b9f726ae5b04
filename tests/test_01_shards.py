"""Challenge 1: whatever the network, the disk or the machine does, a shard is right or it is not there."""

import contextlib
import errno
import io
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fault_server import Fault, Plan, serve

import edu.data.shards
from edu.data.download import Download
from edu.data.shard_folder import download_shards, verify_folder
from edu.data.shards import (
    KNOWN,
    Retry,
    ShardError,
    Source,
    download_shard,
    list_shards,
    read_manifest,
)
from edu.data.sources import find_source, write_shard
from edu.synthetic.world.corpus import write_corpus

QUICK = Retry(timeout=0.5, window=0.4, min_rate=50_000)
SCRIPT = Path(__file__).parent.parent / "scripts" / "download_shards.py"
HUB_FOLDER = "/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main"


def parquet(seed: int, column: str = "text", rows: int = 200) -> bytes:
    """A shard of about 25 KB that does not compress away."""
    chance = random.Random(seed)
    texts = [chance.randbytes(60).hex() for _ in range(rows)]
    buffer = io.BytesIO()
    pq.write_table(pa.table({column: pa.array(texts, pa.string())}), buffer, row_group_size=50, compression="zstd")
    return buffer.getvalue()


def plain_parquet(seed: int) -> bytes:
    """A shard whose layout does not depend on the seed: the halves of two of them make a readable third."""
    texts = [random.Random(1000 * seed + row).randbytes(60).hex() for row in range(200)]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), buffer, compression="none", use_dictionary=False)
    return buffer.getvalue()


SHARD = parquet(0)


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No proxy and no token of the person who runs the tests; no 20 ms a client for certificates, all is http."""
    monkeypatch.setattr("ssl.SSLContext.load_verify_locations", lambda *_, **__: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.fixture
def plan() -> Iterator[Plan]:
    """A server of shard 0 and the validation shard 7."""
    with serve(Plan({"/shard_00000.parquet": SHARD, "/shard_00007.parquet": parquet(7)})) as plan:
        yield plan


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Plan, Plan]]:
    """The Hub, and the storage on another port that it redirects to."""
    files = {f"{HUB_FOLDER}/shard_{index:05d}.parquet": parquet(index) for index in (0, 1, 1822)}
    with serve(Plan(files)) as storage, serve(Plan(files, hub=True, storage=storage.url)) as hub:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield hub, storage


def source(plan: Plan) -> Source:
    """The plan's server as --source sees it."""
    return find_source(f"{plan.url}/shard_{{index:05d}}.parquet", val_index=7)


def get(plan: Plan, folder: Path, index: int = 0, retry: Retry = QUICK, waits: list[float] | None = None) -> Path:
    """Download without waiting; the waits asked for are noted."""
    pause: Callable[[float], object] = (lambda _: None) if waits is None else waits.append
    return download_shard(index, folder, source(plan), retry=retry, pause=pause)


def names(folder: Path) -> set[str]:
    """All files below, without the manifest's."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not name.endswith((".lock", "manifest.json"))}


def test_a_shard_arrives_and_a_second_call_asks_nothing(plan: Plan, tmp_path: Path) -> None:
    path = get(plan, tmp_path)
    assert path == tmp_path / "shard_00000.parquet"
    assert path.read_bytes() == SHARD
    assert get(plan, tmp_path) == path
    assert len(plan.log) == 1
    assert names(tmp_path) == {"shard_00000.parquet"}
    entry = read_manifest(tmp_path)["shard_00000.parquet"]
    assert (entry["size"], entry["url"]) == (len(SHARD), f"{plan.url}/shard_00000.parquet")
    assert verify_folder(tmp_path) == []


ONE_FAULT = [
    *(Fault("reset", at) for at in (0, 1, 4096, len(SHARD) - 1)),
    *(Fault(kind, at) for kind in ("truncate", "truncate_unsized") for at in (0, 1, 4096, len(SHARD) - 1)),
    *(Fault("status", status=status) for status in (408, 429, 500, 502, 503)),
    *(Fault(kind, 4096) for kind in ("stall", "trickle", "corrupt")),
]


@pytest.mark.parametrize("digest", [False, True])
@pytest.mark.parametrize("fault", ONE_FAULT, ids=lambda fault: f"{fault.kind}-{fault.at or fault.status}")
def test_one_fault_of_any_kind_is_survived(plan: Plan, tmp_path: Path, fault: Fault, digest: bool) -> None:
    if fault.kind == "corrupt" and not digest:
        fault = replace(fault, at=len(SHARD) - 1)  # a flipped bit elsewhere may decode to another text
    plan.digest, plan.faults = digest, [fault]
    assert get(plan, tmp_path).read_bytes() == SHARD
    assert len(plan.log) == 2
    assert names(tmp_path) == {"shard_00000.parquet"}
    assert verify_folder(tmp_path) == []


@pytest.mark.parametrize("fault", [Fault(kind, 9000) for kind in ("reset", "truncate", "truncate_unsized", "stall")])
def test_a_broken_transfer_goes_on_where_it_stopped(plan: Plan, tmp_path: Path, fault: Fault) -> None:
    plan.faults = [fault]
    get(plan, tmp_path)
    begun, continued = plan.gets()
    assert "range" not in begun
    received = int(continued["range"].removeprefix("bytes=").removesuffix("-"))
    assert 0 < received <= 9000
    assert fault.kind == "reset" or received == 9000
    assert continued["if-range"].startswith('"')


WHOLE = ("ignore_range", "new_etag")  # answered with the whole file, so that no third request is needed


@pytest.mark.parametrize("second", ["ignore_range", "new_etag", "wrong_range"])
def test_a_server_that_answers_the_range_wrongly_is_started_anew(plan: Plan, tmp_path: Path, second: str) -> None:
    plan.faults = [Fault("truncate", 9000), Fault(second)]
    assert get(plan, tmp_path).read_bytes() == SHARD
    assert ["range" in headers for headers in plan.gets()] == (
        [False, True] if second in WHOLE else [False, True, False]
    )


def test_a_beginning_from_another_url_is_not_continued(plan: Plan, tmp_path: Path) -> None:
    plan.etag, plan.faults = '"same"', [Fault("truncate", 9000)] + [Fault("reset")] * 5
    with pytest.raises(ShardError):
        get(plan, tmp_path)
    plan.files["/other_00000.parquet"] = parquet(99)
    path = download_shard(0, tmp_path, find_source(f"{plan.url}/other_{{index:05d}}.parquet", 7), retry=QUICK)
    assert path.read_bytes() == parquet(99)
    assert "range" not in plan.gets()[-1]
    assert len(plan.log) == 7


def test_what_a_killed_process_had_no_time_to_tidy_is_tidied(plan: Plan, tmp_path: Path) -> None:
    get(plan, tmp_path)
    for leftover in ("part", "etag"):
        (tmp_path / f".shard_00000.parquet.{leftover}").touch()
    get(plan, tmp_path)
    assert names(tmp_path) == {"shard_00000.parquet"}


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
def test_without_a_strong_etag_nothing_is_continued(plan: Plan, tmp_path: Path, etag: str) -> None:
    plan.etag, plan.faults = etag, [Fault("truncate", 9000)]
    assert get(plan, tmp_path).read_bytes() == SHARD
    assert "range" not in plan.gets()[1]


def test_a_file_that_changes_between_attempts_is_never_mixed(plan: Plan, tmp_path: Path) -> None:
    plan.faults = [Fault("truncate", 9000)]
    other = parquet(99)

    def publish(_: float) -> None:
        plan.files["/shard_00000.parquet"] = other

    assert download_shard(0, tmp_path, source(plan), retry=QUICK, pause=publish).read_bytes() == other


def test_a_server_that_ignores_if_range_cannot_mix_two_files(plan: Plan, tmp_path: Path) -> None:
    """The pages of the two are equally long and lie at the same place, so that only the ETag tells them apart."""
    first, other = plain_parquet(1), plain_parquet(2)
    assert first[:9000] + other[9000:] not in (first, other)
    assert len(first) == len(other)
    plan.files["/shard_00000.parquet"] = first
    plan.faults = [Fault("truncate", 9000), Fault("ignore_if_range")]

    def publish(_: float) -> None:
        plan.files["/shard_00000.parquet"] = other

    assert download_shard(0, tmp_path, source(plan), retry=QUICK, pause=publish).read_bytes() == other
    assert len(plan.log) == 3


@pytest.mark.parametrize("begun", [True, False])
def test_no_more_bytes_are_kept_than_were_announced(plan: Plan, tmp_path: Path, begun: bool) -> None:
    """A 206 gives the size by Content-Range, whatever its body then brings; a 200 without a size has the Hub's."""
    sizes: list[int] = []

    def watch(_index: int, done: int, _total: int | None) -> None:
        sizes.append(done)

    plan.faults, plan.hub = [*[Fault("truncate", 9000)] * begun, Fault("endless")], not begun
    where = source(plan) if begun else replace(source(plan), repo="me/mine")
    if not begun:
        where = replace(where, pattern="shard_{index:05d}.parquet")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(edu.data.shards, "hf_hub_url", lambda *_, **__: f"{plan.url}/shard_00000.parquet")
            path = download_shard(0, tmp_path, where, retry=QUICK, pause=lambda _: None, on_progress=watch)
    else:
        path = download_shard(0, tmp_path, where, retry=QUICK, pause=lambda _: None, on_progress=watch)
    assert path.read_bytes() == SHARD
    assert max(sizes) == len(SHARD)
    assert len(plan.log) == 3 if begun else 2


def test_a_range_without_an_etag_starts_anew(plan: Plan, tmp_path: Path) -> None:
    """Nothing says that it is of the file that was begun, so two files could be mixed."""
    first, other = plain_parquet(1), plain_parquet(2)
    plan.files["/shard_00000.parquet"] = first
    plan.faults = [Fault("truncate", 9000), Fault("no_etag")]

    def publish(_: float) -> None:
        plan.files["/shard_00000.parquet"] = other

    assert download_shard(0, tmp_path, source(plan), retry=QUICK, pause=publish).read_bytes() == other


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/a.parquet", "data:text/plain,a"])
def test_a_redirect_to_another_scheme_fails_at_once(plan: Plan, tmp_path: Path, location: str) -> None:
    plan.faults = [Fault("redirect", location=location)] * 9
    with pytest.raises(ShardError, match="redirect"):
        get(plan, tmp_path)
    assert len(plan.log) == 1
    assert names(tmp_path) == set()


def test_headers_that_trickle_in_have_a_time_limit(plan: Plan, tmp_path: Path) -> None:
    plan.faults = [Fault("slow_head")]
    started = time.monotonic()
    assert get(plan, tmp_path).read_bytes() == SHARD
    assert time.monotonic() - started < 4


@pytest.mark.parametrize("kind", ["part", "etag", "lock"])
def test_a_file_that_a_link_of_a_temporary_name_points_to_is_never_written(
    plan: Plan, tmp_path: Path, kind: str
) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("precious")
    link = tmp_path / "data" / f".shard_00000.parquet.{kind}"
    link.parent.mkdir()
    link.symlink_to(mine)
    plan.faults = [Fault("truncate", 9000)]
    with pytest.raises(ShardError) if kind == "lock" else contextlib.nullcontext():  # which filelock does not follow
        assert get(plan, tmp_path / "data").read_bytes() == SHARD
    assert mine.read_text() == "precious"
    assert not (tmp_path / "data/shard_00000.parquet").is_symlink()


def test_backoff_doubles_with_jitter_and_retry_after_is_honoured(plan: Plan, tmp_path: Path) -> None:
    plan.faults = [Fault("status"), Fault("status", status=429, retry_after="7"), Fault("status"), Fault("status")]
    waits: list[float] = []
    get(plan, tmp_path, waits=waits)
    assert len(set(waits)) == 4
    for wait, low, high in zip(waits, (0.5, 7, 2, 4), (1.5, 7, 6, 12), strict=True):
        assert low <= wait <= high
    assert waits[3] != 2 * waits[2]  # not in step with other processes


def test_a_server_that_asks_for_an_hour_is_given_up_at_once(plan: Plan, tmp_path: Path) -> None:
    plan.faults = [Fault("status", status=429, retry_after="3600")]
    waits: list[float] = []
    with pytest.raises(ShardError, match="come back in 3600 s"):
        get(plan, tmp_path, waits=waits)
    assert waits == []


def test_the_last_failure_names_file_url_and_remedy_and_a_rerun_goes_on(plan: Plan, tmp_path: Path) -> None:
    plan.faults = [Fault("truncate", 9000)] + [Fault("reset")] * 5
    with pytest.raises(ShardError) as caught:
        get(plan, tmp_path)
    assert len(plan.log) == 6
    for part in (str(tmp_path / "shard_00000.parquet"), f"{plan.url}/shard_00000.parquet", "run it again"):
        assert part in str(caught.value)
    assert names(tmp_path) == {".shard_00000.parquet.part", ".shard_00000.parquet.etag"}
    assert get(plan, tmp_path).read_bytes() == SHARD
    assert plan.gets()[-1]["range"] == "bytes=9000-"
    assert names(tmp_path) == {"shard_00000.parquet"}


def test_attempts_that_bring_enough_do_not_use_up_the_retries(plan: Plan, tmp_path: Path) -> None:
    plan.faults = [Fault("truncate", 2000)] * 11
    assert get(plan, tmp_path, retry=replace(QUICK, attempts=2, progress=1000)).read_bytes() == SHARD
    plan.faults = [Fault("truncate", 2000)] * 11
    with pytest.raises(ShardError):
        get(plan, tmp_path / "strict", retry=replace(QUICK, attempts=2))


def test_what_an_earlier_process_had_wholly_received_is_not_sent_again(plan: Plan, tmp_path: Path) -> None:
    plan.faults = [Fault("truncate", 9000)] + [Fault("reset")] * 5
    with pytest.raises(ShardError):
        get(plan, tmp_path)
    (tmp_path / ".shard_00000.parquet.part").write_bytes(SHARD)
    assert get(plan, tmp_path).read_bytes() == SHARD
    assert plan.gets()[-1]["range"] == f"bytes={len(SHARD)}-"


@pytest.mark.parametrize(("status", "advice"), [(404, "--source"), (401, "hf auth login"), (403, "HF_TOKEN")])
def test_a_refusal_is_not_tried_again(plan: Plan, tmp_path: Path, status: int, advice: str) -> None:
    plan.faults = [Fault("status", status=status)] * 9
    with pytest.raises(ShardError, match=advice):
        get(plan, tmp_path)
    assert len(plan.log) == 1
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("body", "tries"),
    [(parquet(0, column="content"), 1), (parquet(0, rows=0), 1), (b"<html>please log in</html>", 6), (b"", 6)],
    ids=["no text column", "no rows", "web page", "empty"],
)
def test_what_is_no_shard_never_gets_the_name(plan: Plan, tmp_path: Path, body: bytes, tries: int) -> None:
    plan.files["/shard_00000.parquet"] = body
    with pytest.raises(ShardError, match="parquet"):
        get(plan, tmp_path)
    assert len(plan.log) == tries
    assert names(tmp_path) == set()


def test_zeros_in_the_middle_are_found_without_a_checksum(plan: Plan, tmp_path: Path) -> None:
    plan.files["/shard_00000.parquet"] = SHARD[:8000] + bytes(4000) + SHARD[12000:]
    with pytest.raises(ShardError, match="not a readable parquet"):
        get(plan, tmp_path)
    assert names(tmp_path) == set()


def test_the_token_goes_to_the_hub_and_to_nobody_else(hub: tuple[Plan, Plan], tmp_path: Path) -> None:
    server, storage = hub
    path = download_shard(0, tmp_path, retry=QUICK)
    assert path.read_bytes() == parquet(0)
    asked = [(method, headers) for method, path, headers in server.log if path.endswith(".parquet")]
    assert [method for method, _ in asked] == ["GET"]  # huggingface_hub may ask for news of its own besides
    assert all(headers["authorization"] == "Bearer hf_secret" for _, headers in asked)
    assert len(storage.log) == 1
    assert "hf_secret" not in str(storage.log)
    assert "signature" not in (tmp_path / "manifest.json").read_text()


def test_the_hubs_refusal_is_not_tried_again(hub: tuple[Plan, Plan], tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="HTTP 404"):
        download_shard(5, tmp_path, retry=QUICK)
    assert [method for method, _, _ in hub[0].log] == ["GET"]


def test_no_token_goes_to_a_plain_web_server(plan: Plan, tmp_path: Path) -> None:
    get(plan, tmp_path)
    assert "authorization" not in plan.gets()[0]


def test_an_expired_signed_url_is_asked_for_again(hub: tuple[Plan, Plan], tmp_path: Path) -> None:
    _, storage = hub
    storage.faults = [Fault("truncate", 9000), Fault("status", status=403)]
    path = download_shard(0, tmp_path, retry=QUICK, pause=lambda _: None)
    assert path.read_bytes() == parquet(0)
    assert len({path for _, path, _ in storage.log}) == 3
    assert "range" in storage.gets()[2]


def test_the_hubs_size_tells_that_an_unsized_body_was_cut(hub: tuple[Plan, Plan], tmp_path: Path) -> None:
    storage = hub[1]
    storage.faults = [Fault("truncate_unsized", 9000)]
    assert download_shard(0, tmp_path, retry=QUICK, pause=lambda _: None).read_bytes() == parquet(0)
    assert storage.gets()[1]["range"] == "bytes=9000-"


def test_wrong_content_of_the_right_size_is_refused_by_the_hubs_checksum(
    hub: tuple[Plan, Plan], tmp_path: Path
) -> None:
    storage = hub[1]
    storage.faults = [Fault("corrupt", 5000)]
    assert download_shard(0, tmp_path, retry=QUICK, pause=lambda _: None).read_bytes() == parquet(0)
    storage.faults = [Fault("corrupt", 5000)] * 6
    with pytest.raises(ShardError, match="sha256"):
        download_shard(1, tmp_path, retry=QUICK, pause=lambda _: None)
    assert names(tmp_path) == {"shard_00000.parquet"}


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_full_disk_is_said_and_gets_its_room_back(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    get(plan, tmp_path, index=7)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half(download: Download, *_: object) -> None:
        download.part.write_bytes(SHARD[:9000])
        full()

    with monkeypatch.context() as patch:
        if where == "write":
            patch.setattr(Download, "append", half)
        else:
            patch.setattr("os.fsync", full)
        with pytest.raises(ShardError, match="No space left"):
            get(plan, tmp_path)
    assert names(tmp_path) == {"val/shard_00007.parquet"}
    assert get(plan, tmp_path).read_bytes() == SHARD


CHILD = """
import resource, signal, sys
from edu.data.shards import download_shard
from edu.data.sources import find_source
if len(sys.argv) > 3:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
download_shard(0, sys.argv[2], find_source(sys.argv[1], 7))
"""


def child(plan: Plan, folder: Path, *more: str) -> subprocess.Popen[str]:
    """Another process that downloads shard 0."""
    pattern = f"{plan.url}/shard_{{index:05d}}.parquet"
    command = [sys.executable, "-c", CHILD, pattern, str(folder), *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_a_disk_that_really_refuses_bytes_leaves_no_file(plan: Plan, tmp_path: Path) -> None:
    _, said = (process := child(plan, tmp_path, "10000")).communicate()
    assert process.returncode == 1
    assert "ShardError" in said
    assert "File too large" in said
    assert names(tmp_path) == set()


def test_kill_9_leaves_no_bad_file_and_a_rerun_goes_on(plan: Plan, tmp_path: Path) -> None:
    plan.delay = 0.05
    part = tmp_path / ".shard_00000.parquet.part"
    process = child(plan, tmp_path)
    while not part.exists() or part.stat().st_size < 8000:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "shard_00000.parquet").exists()
    plan.delay = 0
    assert get(plan, tmp_path).read_bytes() == SHARD
    assert int(plan.gets()[1]["range"].removeprefix("bytes=").removesuffix("-")) >= 8000


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(16))
def test_kill_9_at_any_moment_leaves_the_right_file_or_none(plan: Plan, tmp_path: Path, moment: int) -> None:
    """From the request on, through the transfer, the check, the rename and the manifest, to after the end."""
    plan.delay, final = 0.02, tmp_path / "shard_00000.parquet"
    process = child(plan, tmp_path)
    while not plan.log:
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(0.02 * moment)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not final.exists() or final.read_bytes() == SHARD
    plan.delay = 0
    assert get(plan, tmp_path).read_bytes() == SHARD
    assert names(tmp_path) == {"shard_00000.parquet"}
    assert verify_folder(tmp_path) == []


def test_two_processes_and_two_threads_make_one_download(plan: Plan, tmp_path: Path) -> None:
    plan.delay = 0.1  # per 4 KB: long enough for all to arrive
    processes = [child(plan, tmp_path) for _ in range(2)]
    assert download_shards([0, 0], tmp_path, source(plan)) == {}
    for process in processes:
        assert process.communicate()[1] == ""
        assert process.returncode == 0
    assert len(plan.log) == 1
    assert names(tmp_path) == {"shard_00000.parquet"}


def test_what_fails_is_returned_and_the_rest_is_there(plan: Plan, tmp_path: Path) -> None:
    failed = download_shards([0, 3, 7], tmp_path, source(plan), retry=QUICK)
    assert list(failed) == [3]
    assert names(tmp_path) == {"shard_00000.parquet", "val/shard_00007.parquet"}


def test_ctrl_c_stops_all_workers_and_keeps_what_came(plan: Plan, tmp_path: Path) -> None:
    plan.delay = 0.02

    def interrupt(index: int, done: int, _: int | None) -> None:
        if index == 7 and done > 8000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download_shards([0, 7], tmp_path, source(plan), on_progress=interrupt)
    assert {"val/.shard_00007.parquet.part"} <= names(tmp_path)
    assert not list(tmp_path.rglob("*.parquet"))


def test_validation_goes_to_its_own_folder_and_is_never_the_last_file(plan: Plan, tmp_path: Path) -> None:
    get(plan, tmp_path)
    assert list_shards(tmp_path, "train") == [tmp_path / "shard_00000.parquet"]
    with pytest.raises(ValueError, match=r"no val shards .*download_shards\.py --source SOURCE"):
        list_shards(tmp_path, "val")
    assert get(plan, tmp_path, index=7) == tmp_path / "val" / "shard_00007.parquet"
    assert list_shards(tmp_path, "val") == [tmp_path / "val" / "shard_00007.parquet"]
    with pytest.raises(ValueError, match=r"--source climbmix --out data/climbmix"):
        list_shards("data/climbmix", "train")


def test_known_sources_name_the_plans_urls() -> None:
    assert KNOWN["fineweb-edu"].url(0).endswith("karpathy/fineweb-edu-100b-shuffle/resolve/main/shard_00000.parquet")
    assert KNOWN["climbmix"].url(6542).endswith("karpathy/climbmix-400b-shuffle/resolve/main/shard_06542.parquet")
    assert KNOWN["fineweb-edu"].training(1822) == list(range(1822))
    assert KNOWN["climbmix"].training(6542) == list(range(6542))
    with pytest.raises(ValueError, match="1 to 1822"):
        KNOWN["fineweb-edu"].training(1823)
    with pytest.raises(ValueError, match="no shard 1823"):
        KNOWN["fineweb-edu"].url(1823)


@pytest.mark.parametrize(
    ("text", "val_index", "message"),
    [
        ("fineweb", None, "none of tiny, fineweb-edu"),
        ("http://host/{split}.parquet", None, "cannot be filled in"),
        ("http://host/{index:.0s}shard.parquet", None, "cannot be filled in"),
        ("http://host/shard.zip", None, "no file of .parquet, .jsonl, .txt"),
        ("org/name:data/{split}.parquet", None, "cannot be filled in"),
        ("http://host:port/{index}.parquet", None, "cannot be filled in"),
        ("climbmix", 3, "leave it out"),
    ],
)
def test_a_wrong_source_is_explained(text: str, val_index: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_source(text, val_index)


def test_a_folder_serves_as_source_and_two_sources_never_share_one(plan: Plan, tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    (origin / "val").mkdir(parents=True)
    for name, seed in (("b", 1), ("a", 0), ("val/z", 2)):
        (origin / f"{name}.parquet").write_bytes(parquet(seed))
    source = find_source(str(origin))
    assert source.validation == (2,)
    assert download_shards([0, 1, 2], tmp_path / "copy", source) == {}
    copied = [path.read_bytes() for path in sorted((tmp_path / "copy").rglob("*.parquet"))]
    assert copied == [parquet(0), parquet(1), parquet(2)]
    with pytest.raises(ValueError, match="choose another --out"):
        get(plan, tmp_path / "copy")


def test_verify_names_what_is_changed_missing_or_unknown(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to verify"):
        verify_folder(tmp_path)
    path, held_out = get(plan, tmp_path), get(plan, tmp_path, index=7)
    path.write_bytes(SHARD[:100] + b"?" + SHARD[101:])
    held_out.rename(tmp_path / "mine.parquet")
    changed, missing, unknown = verify_folder(tmp_path)
    assert changed.startswith(f"{path}: not the file")
    assert missing.startswith(f"{held_out}: missing")
    assert unknown.startswith(f"{tmp_path / 'mine.parquet'}: not in the manifest")
    path.write_bytes(SHARD[:-1])
    with pytest.raises(ShardError, match="delete it and rerun"):
        get(plan, tmp_path)


def test_a_file_put_there_by_hand_is_taken_if_it_is_a_shard(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "shard_00000.parquet"
    path.write_bytes(SHARD[:-1])
    with pytest.raises(ShardError, match="delete the file"):
        get(plan, tmp_path)
    path.write_bytes(parquet(5))
    assert get(plan, tmp_path).read_bytes() == parquet(5)
    assert json.loads((tmp_path / "manifest.json").read_text()).keys() == {"shard_00000.parquet"}
    assert plan.log == []


def script(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The script's exit code."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return int(caught.value.code or 0)


def texts_of(folder: Path, split: Literal["train", "val"]) -> list[str]:
    """The documents of a split, sorted."""
    return sorted(text for path in list_shards(folder, split) for text in pq.read_table(path)["text"].to_pylist())


def write_files(folder: Path, files: dict[str, list[str]]) -> None:
    """Documents as parquet, JSON lines or text, by the name's ending."""
    for name, texts in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        else:
            path.write_text("\n<|endoftext|>\n".join(texts))


def documents(kind: str, count: int) -> list[str]:
    return [f"{kind} {i} caf\u00e9" for i in range(count)]


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "txt"])
@pytest.mark.parametrize(
    "layout", ["data/{}-00000-of-00001", "{}/0000", "{}", "my_set.{}.1", "en/{}-00000-of-00002-a09b74b3ef9c3b56"]
)
def test_splits_are_read_from_the_hubs_names_of_files_and_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ending: str, layout: str
) -> None:
    monkeypatch.chdir(tmp_path)
    named = {word: f"{layout.format(word)}.{ending}" for word in ("train", "validation", "test")}
    write_files(tmp_path / "mine", {name: documents(word, 9) for word, name in named.items()})
    assert script(monkeypatch, "--source", "mine") == 0
    said = capsys.readouterr().out
    assert named["test"] in said
    strip = {text.strip() for text in texts_of(Path("data/mine"), "train")}
    assert strip == set(documents("train", 9))
    assert {text.strip() for text in texts_of(Path("data/mine"), "val")} == set(documents("validation", 9))
    assert script(monkeypatch, "--source", "mine") == 0  # a rerun finds all of it
    assert script(monkeypatch, "--out", "data/mine", "--verify") == 0


@pytest.mark.parametrize("name", ["mine.parquet", "mine.jsonl", "mine.txt"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_one_file_is_enough_and_gives_both_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, as_folder: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path / "mine", {name: documents("a", 300) + documents("a", 300)})  # each twice
    assert script(monkeypatch, "--source", "mine" if as_folder else f"mine/{name}") == 0
    train, val = (texts_of(Path("data/mine"), split) for split in ("train", "val"))
    assert not {text.strip() for text in train} & {text.strip() for text in val}
    assert {text.strip() for text in (*train, *val)} == set(documents("a", 300))
    assert 1 <= len(val) <= 30
    before = {path: path.stat().st_mtime_ns for path in Path("data/mine").rglob("*.parquet")}
    assert script(monkeypatch, "--source", "mine" if as_folder else f"mine/{name}") == 0
    assert {path: path.stat().st_mtime_ns for path in Path("data/mine").rglob("*.parquet")} == before


def test_files_of_several_kinds_and_many_small_texts_are_taken_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = {f"notes/{i:03d}.txt": [f"note {i}"] for i in range(100)}
    others = {"a.parquet": documents("a", 3), "b.jsonl": documents("b", 3)}
    write_files(tmp_path / "mine", {**small, **others, ".hidden.txt": ["no"], "README.txt": ["no"]})
    assert script(monkeypatch, "--source", "mine") == 0
    train, val = (texts_of(Path("data/mine"), split) for split in ("train", "val"))
    wanted = {*documents("a", 3), *documents("b", 3), *(f"note {i}" for i in range(100))}
    assert {*train, *val} == wanted
    assert len(train) + len(val) == len(wanted)
    assert val
    assert len(list_shards(Path("data/mine"), "train")) == 2


def test_a_folder_whose_files_have_changed_since_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path / "mine", {"b.parquet": documents("b", 9), "c.jsonl": documents("c", 9)})
    assert script(monkeypatch, "--source", "mine") == 0
    write_files(tmp_path / "mine", {"a.parquet": documents("a", 9)})
    assert script(monkeypatch, "--source", "mine") == 1


def test_a_text_without_separators_is_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraphs = [f"{i} " + "word " * 100 + "\n\n" for i in range(100)]
    (tmp_path / "book.txt").write_text("".join(paragraphs))
    write_shard([tmp_path / "book.txt"], tmp_path / "shard", None)
    found = pq.read_table(tmp_path / "shard")["text"].to_pylist()
    assert "".join(found) == "".join(paragraphs)
    assert 10 <= len(found) <= 20
    assert all(text.endswith("\n\n") for text in found)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "caf\u00e9".encode("utf-16"), "a.txt: not UTF-8"),
        ("a.txt", "cafe".encode("utf-16-le"), "a.txt: holds zero bytes"),
        ("a.txt", "caf\u00e9".encode("latin-1"), "a.txt: not UTF-8"),
        ("a.txt", b"short", "a.txt: one document cannot be both"),
        ("a.txt", b" \n", "one document cannot be both"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl, row 1: needs a field 'text'"),
        ("a.jsonl", b'{"messages": []}', "has messages"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "a.jsonl, row 1: not UTF-8"),
        ("a.jsonl", b"", "a.jsonl: no rows"),
        ("a.parquet", b"PAR1", "a.parquet: not a readable parquet file"),
        ("a.zip", b"", "holds no training files"),
        ("validation.jsonl", b'{"text": "a"}', "holds no training files"),
    ],
)
def test_a_file_that_is_no_text_is_named_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine", name).write_bytes(content)
    assert script(monkeypatch, "--source", "mine") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert names(Path("data")) == set()


def test_a_url_of_many_shards_needs_no_flag_and_no_file_is_in_both_splits(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    plan.files["/deep/shard_00000.parquet"] = parquet(0)
    plan.files["/deep/shard_00001.parquet"] = parquet(1)
    pattern = f"{plan.url}/deep/shard_{{index:05d}}.parquet"
    assert script(monkeypatch, "--source", pattern, "--num-shards", 2) == 0
    assert f"{pattern}, a share of shard 0 for validation -> data/deep: 2 shards" in capsys.readouterr().out
    train, val = (texts_of(Path("data/deep"), split) for split in ("train", "val"))
    assert not set(train) & set(val)
    assert len(train) + len(val) == 400
    assert names(Path("data/deep")) == {"shard_00000.parquet", "shard_00001.parquet", "val/shard_00000.parquet"}
    assert script(monkeypatch, "--source", pattern, "--num-shards", 2) == 0
    assert len(plan.log) == 2
    assert script(monkeypatch, "--out", "data/deep", "--verify") == 0
    assert script(monkeypatch, "--source", pattern, "--num-shards", 1, "--val-index", 1) == 2  # shard 1 is for training
    assert texts_of(Path("data/deep"), "val") == val


def test_a_shard_of_one_split_never_enters_the_other(plan: Plan, tmp_path: Path) -> None:
    get(plan, tmp_path, index=7)
    other = replace(source(plan), validation=(0,))
    with pytest.raises(ShardError, match="in the other split"):
        download_shard(7, tmp_path, other, retry=QUICK)
    assert names(tmp_path) == {"val/shard_00007.parquet"}


@pytest.mark.parametrize("name", ["one.jsonl", "one.txt", "one.parquet"])
def test_one_url_is_a_source(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, {name: documents("a", 200)})
    plan.files[f"/{name}"] = Path(name).read_bytes()
    plan.faults = [Fault("truncate", 200)]
    monkeypatch.setattr("edu.data.download.Retry.backoff", lambda *_: 0.0)
    assert script(monkeypatch, "--source", f"{plan.url}/{name}?signature=secret") == 0
    train, val = (texts_of(Path("data/one"), split) for split in ("train", "val"))
    assert {text.strip() for text in (*train, *val)} == set(documents("a", 200))
    assert val
    assert names(Path("data/one")) == {"shard_00000.parquet", "val/shard_00000.parquet"}
    assert "secret" not in Path("data/one/manifest.json").read_text()


def hub_of(files: dict[str, bytes], repo: str) -> dict[str, bytes]:
    """What the Hub answers for a data set of these files."""
    siblings = [{"rfilename": name, "size": len(body)} for name, body in files.items()]
    info = {"id": repo, "sha": "a" * 40, "siblings": siblings}
    served = {f"/datasets/{repo}/resolve/main/{name}": body for name, body in files.items()}
    return {f"/api/datasets/{repo}": json.dumps(info).encode(), **served}


def test_a_data_set_of_the_hub_is_listed_and_its_own_validation_split_used(
    hub: tuple[Plan, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    server, server.storage = hub[0], ""
    files = {f"data/train-0000{i}-of-00002.parquet": parquet(i) for i in (0, 1)}
    files |= {"data/validation-00000-of-00001.parquet": parquet(2), "data/test-00000-of-00001.parquet": parquet(3)}
    server.files |= hub_of({**files, "README.md": b"hello", "vocab.txt": b"a b c"}, "me/stories")
    assert script(monkeypatch, "--source", "me/stories") == 0
    copied = [path.read_bytes() for path in sorted(Path("data/stories").rglob("*.parquet"))]
    assert copied == [parquet(0), parquet(1), parquet(2)]
    said = capsys.readouterr().out
    assert "2 shards for training, 1 for validation, 0.05 MB" in said
    assert "left out (other splits): data/test-00000-of-00001.parquet" in said


def test_a_data_set_of_the_hub_in_one_file_gives_both_splits(
    hub: tuple[Plan, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    server, server.storage = hub[0], ""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents("a", 200)).encode()
    server.files |= hub_of({"train.jsonl": lines}, "me/one")
    assert script(monkeypatch, "--source", "me/one") == 0
    train, val = (texts_of(Path("data/one"), split) for split in ("train", "val"))
    assert {*train, *val} == set(documents("a", 200))
    assert val


def test_of_several_data_sets_in_a_repository_one_is_chosen_by_path(
    hub: tuple[Plan, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    server, server.storage = hub[0], ""
    files = {
        f"{name}/{split}-00000-of-00001.parquet": parquet(7) for name in ("de", "en") for split in ("train", "dev")
    }
    server.files |= hub_of(files, "me/both")
    assert script(monkeypatch, "--source", "me/both") == 2
    assert "choose one of me/both:de, me/both:en" in capsys.readouterr().err
    assert script(monkeypatch, "--source", "me/both:en") == 0
    assert names(Path("data/both")) == {"shard_00000.parquet", "val/shard_00001.parquet"}
    assert script(monkeypatch, "--source", "me/none") == 2
    assert "me/none" in capsys.readouterr().err


def test_shards_are_listed_by_the_splits_their_names_say(tmp_path: Path) -> None:
    """Also where a folder of the Hub's layout is given to training as it stands."""
    write_files(tmp_path, {f"data/{split}-0.parquet": [split] for split in ("train", "validation", "test")})
    assert texts_of(tmp_path, "train") == ["train"]
    assert texts_of(tmp_path, "val") == ["validation"]


@pytest.mark.usefixtures("hub")
def test_the_script_fetches_both_splits_verifies_and_reports_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = Path("data/fineweb-edu")
    assert script(monkeypatch, "--source", "fineweb-edu", "--num-shards", 2) == 0
    assert names(data) == {"shard_00000.parquet", "shard_00001.parquet", "val/shard_01822.parquet"}
    assert script(monkeypatch, "--source", "fineweb-edu", "--verify") == 0
    assert script(monkeypatch, "--source", "fineweb-edu", "--num-shards", 3) == 1
    captured = capsys.readouterr()
    assert "3 of 4 shards are there" in captured.out
    assert f"missing: {data}/shard_00002.parquet" in captured.err
    (data / "val/shard_01822.parquet").unlink()
    assert script(monkeypatch, "--source", "fineweb-edu", "--verify") == 1
    assert "val/shard_01822.parquet: missing" in capsys.readouterr().out


def test_the_tiny_source_is_written_entered_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edu.synthetic.world.corpus.write_corpus", partial(write_corpus, documents=40))
    for seed in (0, 0, 1):
        assert script(monkeypatch, "--out", tmp_path, "--seed", seed) == 0
        assert script(monkeypatch, "--out", tmp_path, "--verify") == 0
    assert list_shards(tmp_path, "train")
    shard = list_shards(tmp_path, "val")[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert script(monkeypatch, "--out", tmp_path, "--verify") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "climbmix", "--num-shards", 0], "--num-shards 0"),
        (["--workers", 0], "--workers 0"),
        (["--source", "climbmix", "--verify"], "nothing to verify"),
        (["--num-shards", 2], "fixed size"),
    ],
)
def test_the_scripts_wrong_options_end_with_one_line(
    arguments: list[object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert script(monkeypatch, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_hf_endpoint_is_respected_by_a_fresh_process(hub: tuple[Plan, Plan], tmp_path: Path) -> None:
    code = f"from edu.data.shards import download_shard; download_shard(0, {str(tmp_path)!r})"
    environment = os.environ | {"HF_ENDPOINT": hub[0].url, "HF_TOKEN": "hf_other"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert (tmp_path / "shard_00000.parquet").read_bytes() == parquet(0)
    assert "hf_other" in str(hub[0].log)
    assert "hf_other" not in str(hub[1].log)


def random_fault(chance: random.Random) -> Fault:
    """Any fault at any byte; waiting ones are rare, since they take 0.05 s."""
    kinds = ["reset", "truncate", "truncate_unsized", "corrupt", "ignore_range", "new_etag", "wrong_range", "status"]
    kind = "stall" if chance.random() < 0.02 else chance.choice(kinds)
    status = chance.choice([408, 429, 500, 502, 503, 404, 403])
    return Fault(kind, chance.randrange(len(SHARD)), status, chance.choice(["", "1", "9999"]))


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(10))
def test_1000_random_schedules_end_with_the_right_file_or_none(plan: Plan, tmp_path: Path, hundred: int) -> None:
    """Up to nine faults, interruptions at any byte, runs until it is there; with and without sizes and checksums."""
    retry = Retry(attempts=4, timeout=0.05, progress=8192)
    for seed in range(100 * hundred, 100 * hundred + 100):
        chance, folder = random.Random(seed), tmp_path / str(seed)
        plan.faults = [random_fault(chance) for _ in range(chance.randrange(10))]
        plan.digest, plan.sized = True, chance.random() < 0.7
        cuts = [chance.randrange(len(SHARD)) for _ in range(chance.randrange(3))]

        def interrupt(_index: int, done: int, _total: int | None, cuts: list[int] = cuts) -> None:
            if cuts and done >= cuts[0]:
                cuts.pop(0)
                raise KeyboardInterrupt

        final, runs = folder / "shard_00000.parquet", 0
        while not final.exists():
            runs += 1
            assert runs < 20, f"schedule {seed} does not end"
            try:
                download_shard(0, folder, source(plan), retry=retry, pause=lambda _: None, on_progress=interrupt)
            except (ShardError, KeyboardInterrupt):
                assert not final.exists(), f"schedule {seed}"
        download_shard(0, folder, source(plan))  # enters it in the manifest if the interruption came before
        assert final.read_bytes() == SHARD, f"schedule {seed}"
        assert names(folder) == {"shard_00000.parquet"}
        assert verify_folder(folder) == []
