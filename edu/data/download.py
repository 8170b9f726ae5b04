"""Download one file over HTTP so that nothing unchecked ever stands at its path (the network half of challenge 1).

1. A file that is there is complete: nothing to do.
2. Bytes are appended to `.NAME.part`. A lock makes one process its owner; the others wait, and find the file.
3. A failed attempt is repeated after exponential backoff with jitter, or the server's Retry-After. It continues by Range
   (RFC 9110, 14), in a later process too, if the strong ETag kept in `.NAME.etag` still holds; else it starts anew.
4. Size, sha256 (where the server gives one) and the caller's check come first, then fsync, then the rename.
"""

import base64
import contextlib
import errno
import hashlib
import random
import re
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any, NoReturn

import httpx2
from filelock import FileLock
from huggingface_hub import is_offline_mode
from huggingface_hub.utils import build_hf_headers

from edu.config.network import http_client, public_url, settings_fault
from edu.data.atomic_io import publish, write_text

Report = Callable[[int, int | None], None]  # (bytes here, bytes in all or None), called after each piece


class TransferError(OSError):
    """The file cannot be had, and why; trying again at once cannot help."""


class Again(Exception):
    """One attempt failed, the next may not. `keep`: the bytes here are a good beginning; `wait`: seconds asked for."""

    def __init__(self, reason: str, *, keep: bool, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.keep, self.wait = keep, wait


@dataclass(frozen=True)
class Retry:
    """Patience with a server. `attempts` bounds the failures in a row; `progress` new bytes start that count anew."""

    attempts: int = 6
    progress: int = 1 << 20  # bytes
    base: float = 1.0  # seconds of the first backoff: doubled with each failure, times 0.5 to 1.5 by chance
    patience: float = 600.0  # seconds: a server that asks for a longer wait (Retry-After) is given up
    timeout: float = 30.0  # seconds without a byte that make an attempt fail
    window: float = 60.0  # seconds over which the speed is measured
    min_rate: float = 1024.0  # bytes of content per second: slower over a window makes an attempt fail

    def backoff(self, failures: int, asked: float) -> float:
        """Return the seconds to wait after this many failures in a row: never less than the server asked for."""
        return max(asked, self.base * 2 ** (failures - 1) * (0.5 + random.random()))


class Watchdog:
    """Shut a connection down that brings less than `min_rate` over a window, be it headers that trickle in or content."""

    def __init__(self, retry: Retry) -> None:
        self.retry, self.received, self.stalled = retry, 0, False
        self._sockets, self._done = list[socket.socket](), Event()

    def trace(self, _event: str, info: dict[str, Any]) -> None:
        """Note the sockets that httpx2 opens."""
        get = getattr(info.get("return_value"), "get_extra_info", None)
        if get and isinstance(opened := get("socket"), socket.socket):
            self._sockets.append(opened)

    def _watch(self) -> None:
        before = self.received
        while not self._done.wait(self.retry.window):
            if self.received - before < self.retry.min_rate * self.retry.window:
                self.stalled = True
                for each in self._sockets:
                    with contextlib.suppress(OSError):
                        each.shutdown(socket.SHUT_RDWR)
            before = self.received

    def __enter__(self) -> "Watchdog":
        Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self.stalled:
            raise Again(f"stalled: less than {self.retry.min_rate:.0f} bytes a second", keep=True)


@dataclass
class Download:
    """A file on its way to `path`: `part` holds the bytes that are here, `etag_file` their URL and strong ETag."""

    url: str
    path: Path
    hub: bool
    retry: Retry
    report: Report | None

    def __post_init__(self) -> None:
        self.part, self.etag_file, self.lock = (
            self.path.with_name(f".{self.path.name}.{kind}") for kind in ("part", "etag", "lock")
        )

    def size(self) -> int:
        """Return how many bytes are here."""
        return self.part.stat().st_size if self.part.exists() else 0

    def restart(self) -> int:
        """Forget what is here; return 0 bytes."""
        self.part.unlink(missing_ok=True)
        self.etag_file.unlink(missing_ok=True)
        return 0

    def run(self, check: Callable[[Path, bool], None], pause: Callable[[float], object]) -> None:
        """Attempt until the partial file is whole and checked."""
        failures = best = 0
        if self.part.is_symlink() or self.etag_file.is_symlink():  # not ours: the file it points to stays as it is
            self.restart()
        hooks = {"response": [_check_redirect]}
        with http_client(self.url, follow_redirects=True, timeout=self.retry.timeout, event_hooks=hooks) as client:
            while True:
                try:
                    self.accept(check, *self.receive(client))
                    return
                except httpx2.HTTPError as error:
                    if fault := settings_fault(error):  # no retry helps
                        raise TransferError(fault) from error
                    failure = Again(f"{type(error).__name__}: {error}", keep=True)
                except Again as error:
                    failure = error
                size = self.size() if failure.keep else self.restart()
                failures = 1 if size >= best + self.retry.progress else failures + 1
                best = max(best, size)
                if failures >= self.retry.attempts or failure.wait > self.retry.patience:
                    raise Again(f"{failure} ({failures} failures in a row)", keep=True) from failure
                pause(self.retry.backoff(failures, failure.wait))

    def receive(self, client: httpx2.Client) -> tuple[int | None, str]:
        """Ask once and append what is missing. Returns size and sha256 as the server tells them (None, "": it does not)."""
        url, _, etag = self.etag_file.read_text().partition("\n") if self.etag_file.exists() else ("", "", "")
        # 1. Bytes that came under the same URL and a strong ETag are a beginning; others are dropped.
        start = self.size() if etag and url == public_url(self.url) else self.restart()
        headers = build_hf_headers() if self.hub else {}  # httpx2 drops the token when redirected to another origin
        headers |= {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-", "If-Range": etag} if start else {})
        with (
            Watchdog(self.retry) as watchdog,
            client.stream("GET", self.url, headers=headers, extensions={"trace": watchdog.trace}) as response,
        ):
            total = self.place(response, start, etag)
            # 2. The checksum of the whole file, where the server tells it.
            sha256 = _digest(response.headers)
            if self.hub:  # its own answer, before it redirects to its storage, knows more
                head = next(
                    (each.headers for each in (*response.history, response) if "X-Linked-Size" in each.headers), {}
                )
                size, etag = head.get("X-Linked-Size"), head.get("X-Linked-Etag", "").strip('"')
                sha256 = etag if re.fullmatch("[0-9a-f]{64}", etag) else sha256
                if size and total not in (None, int(size)):
                    raise Again(f"the Hub says {size} bytes, its storage {total}", keep=False)
                total = int(size) if size else total
            # 3. Append the body; 416 has none, since an earlier attempt had it all.
            if response.status_code != 416:
                self.append(response.iter_raw(), total, watchdog)
            return total, sha256

    def place(self, response: httpx2.Response, start: int, etag: str) -> int | None:
        """Decide by the answer's head where its body belongs: behind what is here, or at 0. Returns the full size."""
        given = response.headers.get("ETag", "")
        span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
        total = int(span[2]) if span and span[2] != "*" else None
        if response.status_code == 200:  # a new file, or a server without ranges
            self.restart()
            write_text(self.etag_file, f"{public_url(self.url)}\n{'' if given.startswith('W/') else given}")
            return int(told) if (told := response.headers.get("Content-Length")) else None
        if start and response.status_code == 206 and span and span[1] == str(start) and given == etag:
            return total
        if start and response.status_code == 416 and total == start and given in ("", etag):
            return total  # an earlier attempt had it all
        if response.status_code in (206, 416):
            raise Again(f"the server answers a range of another file (HTTP {response.status_code})", keep=False)
        refuse(response)

    def append(self, pieces: Iterable[bytes], total: int | None, watchdog: Watchdog) -> None:
        """Write what comes, up to the announced size and not a byte more."""
        done = self.size()
        with self.part.open("ab") as file:
            for piece in pieces:
                watchdog.received += len(piece)
                done += len(piece)
                if total is not None and done > total:
                    raise Again(f"more bytes come than the {total} that were announced", keep=False)
                file.write(piece)
                if self.report:
                    self.report(done, total)

    def accept(self, check: Callable[[Path, bool], None], size: int | None, sha256: str) -> None:
        """Return if the partial file is whole and right."""
        actual = self.size()
        if size is not None and actual != size:
            raise Again(f"{actual} bytes came of {size}", keep=actual < size)
        if sha256 and sha256_of(self.part) != sha256:
            raise Again(f"wrong content: its sha256 is not {sha256}", keep=False)
        try:
            check(self.part, bool(sha256))
        except Again as error:
            error.keep = size is None  # of unknown size: may be a good beginning
            raise
        except TransferError:
            self.restart()
            raise


def fetch(
    url: str,
    path: Path,
    check: Callable[[Path, bool], None],
    *,
    hub: bool = False,
    retry: Retry | None = None,
    pause: Callable[[float], object] = time.sleep,
    report: Report | None = None,
) -> bool:
    """Download `url` (http or https) to `path`; False if something stood there already.

    `check(file, proven)` looks at the complete file (proven: its sha256 is the server's) and raises Again or
    TransferError. `hub`: show it (no other host) the user's token, and heed the size and sha256 that it tells.
    Raises Again when the attempts are used up (what came is kept for the next run), TransferError when no attempt
    can help, OSError from the disk (a full one is given its room back).
    """
    if hub and is_offline_mode():
        raise TransferError("HF_HUB_OFFLINE is set, so nothing is fetched from the Hub: unset it")
    download = Download(url, path, hub, retry or Retry(), report)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = False
    if not path.exists():
        with FileLock(download.lock, fallback_to_soft=False):
            try:
                if fresh := not path.exists():  # else another process was faster
                    download.run(check, pause)
                    publish(download.part, path)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    download.restart()
                raise
            finally:
                if not download.size():
                    download.restart()
    if path.exists():  # leftovers, of a killed process too
        download.restart()
        with contextlib.suppress(OSError):  # Windows: who waits for it holds it open
            download.lock.unlink()
    return fresh


def _check_redirect(response: httpx2.Response) -> None:
    """Raise TransferError for a redirect to anything but the web: file://, data:, ..."""
    location = response.headers.get("Location", "") if response.is_redirect else ""
    if (scheme := re.match(r"[A-Za-z][\w+.-]*(?=:)", location)) and scheme[0].lower() not in ("http", "https"):
        raise TransferError(f"the server redirects to {scheme[0]}:, where nothing is fetched from; check --source")


def refuse(response: httpx2.Response) -> NoReturn:
    """Raise for an answer that brings no content: Again if it may pass, TransferError with advice if not."""
    status, hint = response.status_code, "check --source and the index"
    if status in (408, 425, 429) or status >= 500 or response.history:  # redirected: a signed URL may have expired
        wait = _retry_after(response.headers.get("Retry-After", ""))
        raise Again(f"HTTP {status}" + (f", come back in {wait:.0f} s" if wait else ""), keep=True, wait=wait)
    if status in (401, 403):
        hint = "no access: `hf auth login` or set HF_TOKEN, and accept the dataset's terms on its page if it has any"
    raise TransferError(f"HTTP {status}: {hint}")


def _retry_after(value: str) -> float:
    """Return seconds: RFC 9110, 10.2.3 allows a number or a date.

    >>> _retry_after("7"), _retry_after("Wed, 21 Oct 2015 07:28:00 GMT"), _retry_after("soon")
    (7.0, 0.0, 0.0)
    """
    try:
        return float(value) if value.isdecimal() else max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _digest(headers: httpx2.Headers) -> str:
    """Return the whole file's sha256 in hex from `Repr-Digest` (RFC 9530); "" without one."""
    found = re.search(r"sha-256=:([A-Za-z0-9+/]{43}=):", headers.get("Repr-Digest", ""))
    return base64.b64decode(found[1]).hex() if found else ""


def sha256_of(path: Path) -> str:
    """Return the checksum in hex, read in pieces: about 1 GB/s."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
