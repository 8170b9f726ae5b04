"""Challenge 1: whatever the network, the disk or the machine does, a shard is right or it is not there."""

import errno
import io
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fault_server import Fault, Plan, serve

import edu.data.download
from edu.data.shards import (
    KNOWN,
    Retry,
    ShardError,
    Source,
    download_shard,
    download_shards,
    find_source,
    list_shards,
    read_manifest,
    verify_folder,
)
from edu.synthetic.world.corpus import write_corpus

QUICK = Retry(timeout=0.25, window=0.15, min_rate=100_000)
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
    return found - {"manifest.json", ".manifest.lock"}


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
    assert [method for method, _ in asked] == ["HEAD", "GET"]  # huggingface_hub may ask for news of its own besides
    assert all(headers["authorization"] == "Bearer hf_secret" for _, headers in asked)
    assert len(storage.log) == 1
    assert "hf_secret" not in str(storage.log)
    assert "signature" not in (tmp_path / "manifest.json").read_text()


def test_the_hubs_refusal_is_not_tried_again(hub: tuple[Plan, Plan], tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="HTTP 404"):
        download_shard(5, tmp_path, retry=QUICK)
    assert [method for method, _, _ in hub[0].log] == ["HEAD"]


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

    with monkeypatch.context() as patch:
        if where == "write":
            patch.setattr(edu.data.download, "write_all", full)
        else:
            patch.setattr(edu.data.download.os, "fsync", full)
        with pytest.raises(ShardError, match="No space left"):
            get(plan, tmp_path)
    assert names(tmp_path) == {"val/shard_00007.parquet"}
    assert get(plan, tmp_path).read_bytes() == SHARD


CHILD = """
import resource, signal, sys
from edu.data.shards import download_shard, find_source
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


def test_who_waited_for_a_file_that_was_removed_locks_a_new_one(tmp_path: Path) -> None:
    path, found = tmp_path / "file", []

    def wait() -> None:
        with edu.data.download.locked(path) as file:
            found.append(path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()))

    waiter = threading.Thread(target=wait)
    with edu.data.download.locked(path):
        waiter.start()
        time.sleep(0.05)
        path.unlink()
    waiter.join()
    assert found == [True]


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
        ("http://host/shard.parquet", None, "needs an {index}"),
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
        (["--source", "org/name"], "--val-index"),
        (["--source", "http://host/{index}.parquet"], "--out"),
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
