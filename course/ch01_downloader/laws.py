"""The laws of chapter 1, and the mistakes that they must name."""

import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

from course.grading import Mutant

TITLE = "the shard downloader"
PROVIDES = ("download_shard",)
BODY = b"PAR1" + bytes(range(256)) * 2000 + b"PAR1"
HALF = len(BODY) // 2
REAL_SLEEP = time.sleep


@dataclass
class Server:
    """A server on this machine that answers each request by the next of a list of behaviors, the last one for ever."""

    behaviors: list[str]
    """ok, cut (half of the body, then the connection breaks), bare-cut (the same without a Content-Length), wrong
    (whole, but no parquet file), or a status."""
    asked: list[str] = field(default_factory=list)
    """Paths of the requests."""
    halfway: Callable[[], None] = lambda: None
    """Called while a body is under way."""
    url: str = ""
    body: bytes = BODY

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.asked.append(handler.path)
        behavior = self.behaviors[min(len(self.asked), len(self.behaviors)) - 1]
        if behavior.isdigit():
            handler.send_error(int(behavior))
            return
        body = b"<html>busy</html>" * 100 if behavior == "wrong" else self.body
        handler.send_response(200)
        if behavior != "bare-cut":
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(memoryview(body)[:HALF])
        handler.wfile.flush()
        self.halfway()
        if behavior in ("ok", "wrong"):
            handler.wfile.write(memoryview(body)[HALF:])


@contextmanager
def _serve(*behaviors: str) -> Iterator[Server]:
    server = Server(list(behaviors))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with suppress(ConnectionError):  # the client may leave
                server.answer(self)

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


def _download(
    m: Any, folder: str | Path, server: Server, index: int = 7, **settings: Any
) -> tuple[Path | Exception, list[float]]:
    """Download with a clock that does not wait: the path or the error, and the waits that were asked for."""
    waits: list[float] = []
    original, own = time.sleep, getattr(m, "sleep", None)
    time.sleep = waits.append
    if own is not None:
        m.sleep = waits.append
    try:
        return m.download_shard(index, Path(folder), base_url=server.url, **settings), waits
    except NotImplementedError:
        raise
    except Exception as error:
        return error, waits
    finally:
        time.sleep = original
        if own is not None:
            m.sleep = own


def _expect_file(found: Path | Exception, folder: str, what: str) -> None:
    if isinstance(found, Exception):
        raise AssertionError(f"{what}: {type(found).__name__}: {found}")
    expected = Path(folder) / "shard_00007.parquet"
    assert Path(found) == expected, (
        f"{what}: the path returned is {found}, expected {expected.name} in the target folder"
    )
    assert expected.read_bytes() == BODY, (
        f"{what}: the file has {expected.stat().st_size:,} bytes, expected these {len(BODY):,}"
    )


def law_downloads(m: Any) -> None:
    """The shard's file arrives under its name, byte for byte, in a folder that is made if need be."""
    with _serve("ok") as server, tempfile.TemporaryDirectory() as folder:
        deep = str(Path(folder) / "a" / "b")
        found, _ = _download(m, deep, server)
        _expect_file(found, deep, "a healthy server")
        assert server.asked == ["/shard_00007.parquet"], f"asked for {server.asked}, expected /shard_00007.parquet once"
        left = sorted(path.name for path in Path(deep).iterdir())
        assert left == ["shard_00007.parquet"], f"the folder holds {left}: the temporary file stays behind"


def law_present_is_not_asked(m: Any) -> None:
    """A shard that is there is not asked for again, and stays as it is."""
    with _serve("ok") as server, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard_00007.parquet"
        path.write_bytes(b"PAR1 mine PAR1")
        found, _ = _download(m, folder, server)
        assert not server.asked, f"the file was there, and the server was asked for {server.asked}"
        assert not isinstance(found, Exception), f"the file was there, and {found!r} was raised"
        assert path.read_bytes() == b"PAR1 mine PAR1", "the file that was there has been changed"


def _names_once_there_are(folder: Path) -> set[str]:
    """The names in a folder, once the client has made a file, or after half a second."""
    for _ in range(50):
        if names := {path.name for path in folder.iterdir()}:
            return names
        REAL_SLEEP(0.01)
    return set()


def law_final_name_means_whole(m: Any) -> None:
    """While a body is under way the final name does not exist."""
    with _serve("ok") as server, tempfile.TemporaryDirectory() as folder:
        seen: list[bool] = []
        server.halfway = lambda: seen.append("shard_00007.parquet" in _names_once_there_are(Path(folder)))
        found, _ = _download(m, folder, server)
        _expect_file(found, folder, "a healthy server")
        assert seen == [False], (
            "half of the body had come, and the final name was there: a crash now leaves half a shard that looks whole"
        )


def law_breaks_are_survived(m: Any) -> None:
    """A connection that breaks, and a server that is busy, are tried again."""
    for behaviors in (("cut", "ok"), ("503", "ok"), ("429", "500", "ok"), ("cut", "cut", "cut", "ok")):
        with _serve(*behaviors) as server, tempfile.TemporaryDirectory() as folder:
            found, _ = _download(m, folder, server)
            _expect_file(found, folder, f"a server that does {', then '.join(behaviors)}")
            assert len(server.asked) == len(behaviors), f"{', '.join(behaviors)}: {len(server.asked)} requests"


def law_waits_double(m: Any) -> None:
    """Between attempts it waits 1, 2, 4, ... seconds, so that a busy server gets air."""
    with _serve("503") as server, tempfile.TemporaryDirectory() as folder:
        _, waits = _download(m, folder, server, attempts=4)
        assert len(waits) == 3, f"4 attempts have 3 waits between them; time.sleep was called with {waits}"
        ratios = [later / earlier for earlier, later in pairwise(waits) if earlier]
        assert ratios, f"the waits are {waits}, expected about 1, 2, 4"
        assert all(1.5 <= ratio <= 3 for ratio in ratios), (
            f"the waits are {waits}, expected about 1, 2, 4: each twice the one before"
        )


def law_missing_is_not_retried(m: Any) -> None:
    """A shard that does not exist is an error at once, and names the URL."""
    with _serve("404") as server, tempfile.TemporaryDirectory() as folder:
        found, waits = _download(m, folder, server)
        assert isinstance(found, Exception), f"the server said 404, and {found} was returned"
        assert len(server.asked) == 1, f"the server said 404 {len(server.asked)} times: it will not change its mind"
        assert not waits, f"waited {waits} seconds for a shard that does not exist"
        assert "shard_00007" in str(found), f"the error is {str(found)!r}: which shard was it?"
        assert not any(Path(folder).glob("*.parquet")), "the server said 404, and a shard is there"


def law_gives_up(m: Any) -> None:
    """After so many attempts it raises, and names the URL."""
    with _serve("503") as server, tempfile.TemporaryDirectory() as folder:
        found, _ = _download(m, folder, server, attempts=3)
        assert isinstance(found, Exception), f"the server never answered, and {found} was returned"
        assert len(server.asked) == 3, f"attempts=3, and the server was asked {len(server.asked)} times"
        assert "shard_00007" in str(found), f"the error is {str(found)!r}: which shard was it?"


def law_truncated_is_refused(m: Any) -> None:
    """Half a body is never taken for a shard, with or without a Content-Length."""
    for behavior in ("cut", "bare-cut"):
        with _serve(behavior) as server, tempfile.TemporaryDirectory() as folder:
            found, _ = _download(m, folder, server, attempts=2)
            what = "with" if behavior == "cut" else "without"
            there = (Path(folder) / "shard_00007.parquet").exists()
            assert not there, (
                f"a body that breaks off, {what} a Content-Length, was accepted: compare lengths, look for PAR1 at the end"
            )
            assert isinstance(found, Exception), (
                f"a body that breaks off, {what} a Content-Length: {found} was returned"
            )


def law_wrong_is_refused(m: Any) -> None:
    """A page of HTML with status 200 is no shard."""
    with _serve("wrong", "ok") as server, tempfile.TemporaryDirectory() as folder:
        found, _ = _download(m, folder, server)
        _expect_file(found, folder, "a server that sends a page of HTML first")


def law_leftovers_do_no_harm(m: Any) -> None:
    """What an earlier run left under a temporary name does not end up in the shard."""
    with _serve("ok") as server, tempfile.TemporaryDirectory() as folder:
        seen: set[str] = set()
        server.halfway = lambda: seen.update(_names_once_there_are(Path(folder)))
        _download(m, folder, server)
        (Path(folder) / "shard_00007.parquet").unlink()
        for name in seen:
            (Path(folder) / name).write_bytes(b"left by a crash" * 100_000)
        found, _ = _download(m, folder, server)
        _expect_file(found, folder, "a temporary file left by a crash")


def law_in_parts(m: Any) -> None:
    """The body is written as it comes, not gathered in memory."""
    with _serve("ok") as server, tempfile.TemporaryDirectory() as folder:
        server.body = b"PAR1" + bytes(24_000_000) + b"PAR1"
        tracemalloc.start()
        try:
            _download(m, folder, server)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 12_000_000, f"a body of 24 MB took {peak / 1e6:.0f} MB of memory: read it in parts"


MUTANTS = [
    Mutant("downloaded again", "    if path.exists():\n        return path\n", "", "present_is_not_asked"),
    Mutant("written under the final name", 'temporary = target_dir / f".{name}.part"', "temporary = path", "final_name_means_whole"),
    Mutant("no retry", "for attempt in range(attempts):", "for attempt in range(1):", "breaks_are_survived"),
    Mutant("busy is final", "if error.code != 429 and error.code < 500:", "if True:", "breaks_are_survived"),
    Mutant("404 is retried", "if error.code != 429 and error.code < 500:", "if False:", "missing_is_not_retried"),
    Mutant("equal waits", "time.sleep(2**attempt)", "time.sleep(1)", "waits_double"),
    Mutant("a wait after the last attempt", "if attempt + 1 < attempts:", "if True:", "waits_double"),
    Mutant("only the length is checked", 'if first != b"PAR1" or file.read(4) != b"PAR1":', "if False:", "truncated_is_refused"),
    Mutant("only the beginning is checked", 'if first != b"PAR1" or file.read(4) != b"PAR1":', 'if first != b"PAR1":', "truncated_is_refused"),
    Mutant("one attempt too many", "for attempt in range(attempts):", "for attempt in range(attempts + 1):", "gives_up"),
    Mutant("errors that name nothing", 'raise RuntimeError(f"{url}: {error}") from None', 'raise RuntimeError("not found") from None', "missing_is_not_retried"),
    Mutant("added to what was left", 'temporary.open("wb") as file:\n        while', 'temporary.open("ab") as file:\n        while', "leftovers_do_no_harm"),
    Mutant("all at once", "while part := response.read(1 << 16):", "while part := response.read():", "in_parts"),
]  # fmt: skip
