"""A web server on 127.0.0.1 that serves files with planned faults, one fault a GET, then behaves."""

import base64
import hashlib
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Fault:
    """Fault of one GET. `at`: the byte of the answer's body at which it does."""

    kind: str
    """reset, truncate, truncate_unsized, stall, trickle, corrupt, status, new_etag, wrong_range, ignore_range,
    ignore_if_range, no_etag (and ignore_if_range), endless (more bytes than announced), slow_head, redirect."""
    at: int = 0
    status: int = 500
    retry_after: str = ""
    location: str = ""
    """Of a redirect."""


@dataclass
class Plan:
    """Behavior of a server, and what it saw; change it while it runs."""

    files: dict[str, bytes]
    """Body by path."""
    faults: list[Fault] = field(default_factory=list)
    """Used up one by one by GETs."""
    digest: bool = False
    """Send Repr-Digest."""
    etag: str = "by content"
    """Else this one; "" for none."""
    hub: bool = False
    """Answer as the Hub does: metadata in headers; GET and HEAD are redirected to `storage`."""
    storage: str = ""
    """http://host:port of the server that redirects lead to."""
    sized: bool = True
    """Send Content-Length; else the body ends with the connection."""
    delay: float = 0.0
    """Seconds between pieces of 4 KB."""
    log: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    """(method, path, headers) of each request."""
    url: str = ""
    released: threading.Event = field(default_factory=threading.Event)
    """Set when the server closes: stalled answers end."""

    def gets(self) -> list[dict[str, str]]:
        """Return the headers of each GET so far, names in lower case."""
        return [headers for method, _, headers in self.log if method == "GET"]


class Handler(BaseHTTPRequestHandler):
    """Answers one connection after the plan of its server."""

    plan: Plan

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        """Answer with metadata."""
        self.answer("HEAD")

    def do_GET(self) -> None:
        """Answer with a file, whole or from a byte on, or a fault."""
        self.answer("GET")

    def answer(self, method: str) -> None:
        """Log, choose the fault, send; a client that hung up is nothing special."""
        plan = self.plan
        plan.log.append((method, self.path, {name.lower(): value for name, value in self.headers.items()}))
        body = plan.files.get(self.path.partition("?")[0])
        fault = plan.faults.pop(0) if method == "GET" and plan.faults and not (plan.hub and plan.storage) else Fault("")
        try:
            if body is None or fault.kind == "status":
                self.send_response(404 if body is None else fault.status)
                if fault.retry_after:
                    self.send_header("Retry-After", fault.retry_after)
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif fault.kind == "redirect":
                self.send_response(302)
                self.send_header("Location", fault.location)
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif fault.kind == "slow_head":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                while not plan.released.wait(0.02):
                    self.wfile.write(b"x")
            elif plan.hub:
                self.send_hub(body, fault, method)
            elif plan.storage:
                self.send_redirect()
            else:
                self.send_file(body, fault, method)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def send_redirect(self, *headers: tuple[str, str]) -> None:
        """302 to a signed URL of the storage."""
        self.send_response(302)
        self.send_header("Location", f"{self.plan.storage}{self.path}?signature={len(self.plan.log)}")
        for name, value in (*headers, ("Content-Length", "0")):
            self.send_header(name, value)
        self.end_headers()

    def send_hub(self, body: bytes, fault: Fault, method: str) -> None:
        """Send what huggingface_hub needs to know, and the way to the content."""
        sha256 = hashlib.sha256(body).hexdigest()
        metadata = (("X-Repo-Commit", "a" * 40), ("X-Linked-Etag", f'"{sha256}"'), ("X-Linked-Size", str(len(body))))
        if self.plan.storage:
            self.send_redirect(*metadata)
        else:
            self.send_file(body, fault, method, *metadata)

    def send_file(self, body: bytes, fault: Fault, method: str, *more: tuple[str, str]) -> None:
        """200 or 206 or 416, headers, and the body up to what the fault lets through."""
        etag = f'"{hashlib.md5(body).hexdigest()}"' if self.plan.etag == "by content" else self.plan.etag
        etag = {"new_etag": '"another"', "no_etag": ""}.get(fault.kind, etag)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range", etag) == etag or fault.kind in ("ignore_if_range", "no_etag", "endless")
        start = int(asked[1]) if asked and same and fault.kind != "ignore_range" else 0
        ranged = start > 0
        status = 200 if not ranged else 206 if start < len(body) else 416
        shift = 1 if fault.kind == "wrong_range" and ranged else 0
        span = f"bytes {start + shift}-{len(body) - 1}/{len(body)}" if status == 206 else f"bytes */{len(body)}"
        sized = self.plan.sized and fault.kind not in ("truncate_unsized", "endless")
        content = b"" if status == 416 else body[start + shift :]
        digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
        headers = [("Content-Range", span)] * ranged + [("ETag", etag)] * bool(etag) + list(more)
        headers += [("Repr-Digest", f"sha-256=:{digest}:")] * self.plan.digest
        headers += [("Content-Length", str(len(content)))] if sized or status == 416 else [("Connection", "close")]
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if method == "GET":
            self.send_body(content, fault)

    def send_body(self, content: bytes, fault: Fault) -> None:
        """Piece by piece, until the fault strikes."""
        self.close_connection = True
        if fault.kind == "corrupt" and content:
            at = min(fault.at, len(content) - 1)
            content = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        broken = fault.kind in ("reset", "truncate", "truncate_unsized", "stall", "trickle")
        good = content[: fault.at] if broken else content
        piece = 4096 if self.plan.delay else len(good) or 1
        for at in range(0, len(good), piece):
            self.wfile.write(good[at : at + piece])
            self.plan.released.wait(self.plan.delay)
        if fault.kind == "reset":  # RST instead of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif fault.kind == "endless":
            while not self.plan.released.wait(0.001):
                self.wfile.write(bytes(1 << 16))
        elif fault.kind == "stall":
            self.plan.released.wait(5)
        elif fault.kind == "trickle":
            for at in range(fault.at, len(content)):
                self.wfile.write(content[at : at + 1])
                time.sleep(0.01)


class Server(ThreadingHTTPServer):
    """Threads end with the server."""

    daemon_threads = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore it: a connection that the fault has closed is no error."""


@contextmanager
def serve(plan: Plan) -> Iterator[Plan]:
    """Serve a plan; its `url` is filled in."""
    server = Server(("127.0.0.1", 0), type("Planned", (Handler,), {"plan": plan}))
    plan.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield plan
    finally:
        plan.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
