"""One file from a URL to a path, so that nothing unchecked ever stands at that path: the network half of challenge 1.

1. What is there already is complete: nothing to do.
2. Otherwise the bytes are appended to `.NAME.part`, held by flock: one process owns it, the others wait and find PATH.
3. A broken attempt is repeated after exponential backoff with jitter, or the server's Retry-After. It goes on by Range
   (RFC 9110, 14), in a later process too, if the strong ETag kept in `.NAME.etag` still holds; else it starts anew.
4. Size, sha256 (where the server gives one) and the caller's check come first, then fsync, then the rename.
"""

import base64
import errno
import fcntl
import hashlib
import io
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NoReturn

import httpx2
from huggingface_hub import get_hf_file_metadata
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers

from edu.config.network import http_client, settings_fault
from edu.data.atomic_io import publish

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
    """How long to insist. `attempts` bounds the failures in a row; `progress` new bytes start that count anew."""

    attempts: int = 6
    progress: int = 1 << 20  # bytes
    base: float = 1.0  # seconds of the first backoff: doubled with each failure, times 0.5 to 1.5 by chance
    patience: float = 600.0  # seconds: a server that asks for a longer wait (Retry-After) is given up
    timeout: float = 30.0  # seconds without a byte that make an attempt fail
    window: float = 60.0  # seconds over which the speed is measured
    min_rate: float = 1024.0  # bytes per second: slower over a window makes an attempt fail

    def backoff(self, failures: int, asked: float) -> float:
        """Seconds to wait after this many failures in a row: never less than the server asked for."""
        return max(asked, self.base * 2 ** (failures - 1) * (0.5 + random.random()))


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
    """Have the content of `url` (http, https, or a local path) at `path`; False if something stood there already.

    `check(file, proven)` looks at the complete file (proven: its sha256 is the server's) and raises Again or
    TransferError. `hub`: ask the Hub for size and sha256, and show it (no other host) the user's token.
    Raises Again when the attempts are used up (what came is kept for the next run), TransferError when no attempt
    can help, OSError from the disk (a full one is given its room back).
    """
    part, etag_file = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.etag")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        _remove(part, etag_file)  # an earlier process may have been killed just before it did
        return False
    with locked(part) as file:
        transfer = _Transfer(url, hub, etag_file, file, check, retry or Retry(), report)
        try:
            if path.exists():  # another process was faster
                return False
            transfer.run(part, pause)
            publish(part, path)
            return True
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                transfer.restart()
            raise
        finally:
            if path.exists() or not transfer.size():  # nothing left to go on from
                _remove(part, etag_file)


@dataclass(frozen=True)
class _Transfer:
    """A file on its way: the partial file, open for appending and locked, and what an attempt needs to know."""

    url: str
    hub: bool
    etag_file: Path
    file: io.FileIO
    check: Callable[[Path, bool], None]
    retry: Retry
    report: Report | None

    def run(self, part: Path, pause: Callable[[float], object]) -> None:
        """Attempt until the partial file is whole, checked and on the disk."""
        failures, best = 0, 0
        try:
            client = http_client(self.url, follow_redirects=True, timeout=self.retry.timeout)
        except ConnectionError as error:
            raise TransferError(str(error)) from error
        with client:
            while True:
                try:
                    self.accept(part, *(self.receive(client) if "://" in self.url else self.copy()))
                    return
                except (httpx2.HTTPError, Again, ImportError, OfflineModeIsEnabled) as error:
                    if fault := settings_fault(error):  # no retry helps
                        raise TransferError(fault) from error
                    failure = (
                        error if isinstance(error, Again) else Again(f"{type(error).__name__}: {error}", keep=True)
                    )
                size = self.size() if failure.keep else self.restart()
                failures = 1 if size >= best + self.retry.progress else failures + 1
                best = max(best, size)
                if failures >= self.retry.attempts or failure.wait > self.retry.patience:
                    raise Again(f"{failure} ({failures} failures in a row)", keep=True) from failure
                pause(self.retry.backoff(failures, failure.wait))

    def receive(self, client: httpx2.Client) -> tuple[int | None, str]:
        """Ask once and append what is missing. Returns size and sha256 as the server tells them (None, "": it does not)."""
        size, sha256 = self.ask_hub() if self.hub else (None, "")
        url, _, etag = self.etag_file.read_text().partition("\n") if self.etag_file.exists() else ("", "", "")
        start = self.size() if etag and url == public(self.url) else self.restart()
        headers = build_hf_headers() if self.hub else {}  # httpx2 drops the token when redirected to another origin
        headers["Accept-Encoding"] = "identity"
        if start:
            headers |= {"Range": f"bytes={start}-", "If-Range": etag}
        with client.stream("GET", self.url, headers=headers) as response:
            total = self.place(response, start, etag)
            if size is not None and total is not None and size != total:
                raise Again(f"the Hub says {size} bytes, its storage {total}", keep=False)
            total = total if size is None else size
            if response.status_code != 416:
                self.append(response.iter_raw(), total)
            return total, sha256 or _digest(response.headers)

    def place(self, response: httpx2.Response, start: int, etag: str) -> int | None:
        """Decide by the answer's head where its body belongs: behind what is here, or at 0. Returns the full size."""
        given = response.headers.get("ETag", "")
        span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
        total = int(span[2]) if span and span[2] != "*" else None
        if response.status_code == 200:  # a new file, or a server without ranges
            self.restart()
            self.etag_file.write_text(f"{public(self.url)}\n{'' if given.startswith('W/') else given}")
            return int(told) if (told := response.headers.get("Content-Length")) else None
        fits = span and span[1] == str(start) and given in ("", etag)
        if start and ((response.status_code == 206 and fits) or (response.status_code == 416 and total == start)):
            return total  # 416: an earlier attempt had it all
        if response.status_code in (206, 416):
            raise Again(f"the server answers a range of another file (HTTP {response.status_code})", keep=False)
        refuse(response)

    def ask_hub(self) -> tuple[int | None, str]:
        """Size and, for large files, sha256 from the Hub's answer to HEAD."""
        try:
            found = get_hf_file_metadata(self.url, timeout=self.retry.timeout)
        except HfHubHTTPError as error:
            refuse(error.response)
        return found.size, found.etag if found.etag and re.fullmatch("[0-9a-f]{64}", found.etag) else ""

    def copy(self) -> tuple[int, str]:
        """What `receive` does, for a local file."""
        self.restart()
        with Path(self.url).open("rb") as original:
            size = os.fstat(original.fileno()).st_size
            self.append(iter(lambda: original.read(1 << 20), b""), size)
        return size, ""

    def append(self, pieces: Iterable[bytes], total: int | None) -> None:
        """Write; an attempt slower than `min_rate` over a whole window fails, since it might trickle for ever."""
        done = window_done = self.size()
        window_start = time.monotonic()
        for piece in pieces:
            write_all(self.file, piece)
            done += len(piece)
            if self.report:
                self.report(done, total)
            if (passed := time.monotonic() - window_start) > self.retry.window:
                if done - window_done < self.retry.min_rate * passed:
                    raise Again(f"stalled: {done - window_done} bytes in {passed:.0f} s", keep=True)
                window_start, window_done = time.monotonic(), done

    def accept(self, part: Path, size: int | None, sha256: str) -> None:
        """Return if the partial file is whole and right, and on the disk."""
        actual = self.size()
        if size is not None and actual != size:
            raise Again(f"{actual} bytes came of {size}", keep=actual < size)
        if sha256 and sha256_of(part) != sha256:
            raise Again(f"wrong content: its sha256 is not {sha256}", keep=False)
        try:
            self.check(part, bool(sha256))
        except Again as error:
            error.keep = size is None  # of unknown size: may be a good beginning
            raise
        except TransferError:
            self.restart()
            raise

    def size(self) -> int:
        return self.file.seek(0, os.SEEK_END)

    def restart(self) -> int:
        return self.file.truncate(0)


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


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
    """Seconds: RFC 9110, 10.2.3 allows a number or a date.

    >>> _retry_after("7"), _retry_after("Wed, 21 Oct 2015 07:28:00 GMT"), _retry_after("soon")
    (7.0, 0.0, 0.0)
    """
    try:
        return float(value) if value.isdecimal() else max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _digest(headers: httpx2.Headers) -> str:
    """The whole file's sha256 in hex from `Repr-Digest` (RFC 9530); "" without one."""
    found = re.search(r"sha-256=:([A-Za-z0-9+/]{43}=):", headers.get("Repr-Digest", ""))
    return base64.b64decode(found[1]).hex() if found else ""


def public(url: str) -> str:
    """The URL without what may be secret: user, password, query.

    >>> public("https://me:key@host/a.parquet?signature=x")
    'https://host/a.parquet'
    """
    return re.sub(r"(?<=://)[^/@]*@", "", url).partition("?")[0] if "://" in url else url


def write_all(file: io.FileIO, piece: bytes) -> None:
    """An unbuffered write may be short (a disk just full): go on until all is written or an OSError says why not."""
    view = memoryview(piece)
    while view:
        view = view[file.write(view) :]


def sha256_of(path: Path) -> str:
    """The checksum in hex, read in pieces: about 1 GB/s."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[io.FileIO]:
    """Create and open a file for appending, and be its only owner among processes and threads; waits for others."""
    while True:
        with path.open("ab+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:  # the owner we waited for may have renamed or removed it: then we hold a nameless file
                ours = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                ours = False
            if ours:
                yield file
                return
