"""A server on 127.0.0.1 that speaks the part of the Hub's protocol that its clients need here, with planned faults."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".safetensors", ".parquet")  # the real Hub decides by size and kind; datasets needs parquet to be among them


@dataclass
class Repo:
    """A model or data set: the files of each commit, and the commit of each branch."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Make these files the branch's; gives the commit's id."""
        sha = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha


@dataclass
class Fault:
    """The next `times` requests whose "METHOD path" contains `at` are answered by `status`; 0: the connection is cut."""

    at: str
    status: int
    times: int = 1


@dataclass
class Hub:
    """What the server holds and what it saw; change it while it runs."""

    tokens: dict[str, str] = field(default_factory=lambda: {"hf_me": "me"})
    """User by token."""
    repos: dict[str, Repo] = field(default_factory=dict)
    """By models/user/name or datasets/user/name."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    """LFS objects by sha256."""
    faults: list[Fault] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    """METHOD path of each request."""
    url: str = ""

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> None:
        """A repository that is there already."""
        self.repos[name] = Repo(private)
        self.repos[name].commit("main", files)

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """What a branch holds."""
        return self.repos[name].commits[self.repos[name].branches[branch]]


class Refusal(Exception):
    """An answer that is an error; `code` is what the client tells errors apart by."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message}


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def answer(self) -> None:
        """Log, read the body, fail if that is planned, else find the route."""
        asked = f"{self.command} {self.path}"
        self.hub.log.append(asked)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.user = self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        fault = next((fault for fault in self.hub.faults if fault.times and fault.at in asked), None)
        try:
            if fault is not None:
                fault.times -= 1
                if fault.status == 0:
                    self.close_connection = True
                    return
                raise Refusal(fault.status, "planned")
            for pattern, route in ROUTES:
                if match := re.fullmatch(pattern, f"{self.command} {urlsplit(self.path).path}"):
                    route(self, *(unquote(part) for part in match.groups(default="")))
                    return
            raise Refusal(404, "no such page")
        except Refusal as error:
            self.send(b"" if self.command == "HEAD" else json.dumps({"error": str(error)}), error.status, error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, body: bytes | str, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """One answer; Content-Length may be given for HEAD."""
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def repo(self, kind: str, name: str, write: bool = False) -> Repo:
        """A repository that the caller may see (and write to); a private one does not exist for others."""
        found = self.hub.repos.get(f"{kind.strip('/') or 'models'}/{name}")
        if found is None or (found.private and self.user != name.split("/")[0]):
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and self.user != name.split("/")[0]:
            raise Refusal(403, "You don't have the rights to write here")
        return found

    def at(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]]:
        """Commit id and files of a branch or commit."""
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repo.commits[sha]

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        key = f"{asked.get('type', 'model')}s/{name}"
        if self.user != name.split("/")[0]:
            raise Refusal(403 if self.user else 401, "You don't have the rights to create this repository")
        exists = key in self.hub.repos
        if not exists:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.add(key, {".gitattributes": b"*.safetensors filter=lfs"}, private)
        self.send(json.dumps({"url": f"{self.hub.url}/{name}"}), 409 if exists else 200)

    def validate(self) -> None:
        self.send('{"errors": [], "warnings": []}')

    def branch(self, kind: str, name: str, branch: str) -> None:
        repo = self.repo(kind, name, write=True)
        exists = branch in repo.branches
        if not exists:
            repo.commit(branch, self.at(repo, "main")[1])
        self.send("{}", 409 if exists else 200)

    def preupload(self, kind: str, name: str, revision: str) -> None:
        self.at(self.repo(kind, name, write=True), revision)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {path: "lfs" if path.endswith(LFS) else "regular" for path in paths}
        files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        self.send(json.dumps({"files": files}))

    def batch(self, name: str) -> None:
        self.repo("models", name, write=True)
        objects: list[dict[str, object]] = []
        for asked in json.loads(self.body)["objects"]:
            links = {key: {"href": f"{self.hub.url}/lfs/{asked['oid']}/{key}"} for key in ("upload", "verify")}
            objects.append(asked if asked["oid"] in self.hub.blobs else asked | {"actions": links})
        self.send(json.dumps({"transfer": "basic", "objects": objects}))

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "not the content that was announced")
        self.hub.blobs[oid] = self.body
        self.send("")

    def verify(self, oid: str) -> None:
        if oid not in self.hub.blobs:
            raise Refusal(404, "never arrived")
        self.send("")

    def commit(self, kind: str, name: str, revision: str) -> None:
        repo = self.repo(kind, name, write=True)
        files = dict(self.at(repo, revision)[1])
        for key, value in ((line["key"], line["value"]) for line in map(json.loads, self.body.splitlines())):
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(revision, files)
        self.send(json.dumps({"commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"}))

    def info(self, kind: str, name: str, revision: str = "main") -> None:
        repo = self.repo(kind, name)
        sha, files = self.at(repo, revision)
        siblings = [{"rfilename": path} for path in files]
        self.send(json.dumps({"id": name, "sha": sha, "private": repo.private, "siblings": siblings}))

    def tree(self, kind: str, name: str, revision: str, folder: str = "") -> None:
        _, files = self.at(self.repo(kind, name), revision)
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        inside = {path: body for path, body in files.items() if path.startswith(prefix)}
        if prefix and not inside:
            raise Refusal(404, "no such folder", "EntryNotFound")
        deep = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
        found = []
        for path, body in inside.items():
            head, _, rest = path.removeprefix(prefix).partition("/")
            if deep or not rest:
                found.append({"type": "file", "path": path, "size": len(body), "oid": hashlib.sha1(body).hexdigest()})
            if (
                rest
                and (entry := {"type": "directory", "path": prefix + head, "size": 0, "oid": "0" * 40}) not in found
            ):
                found.append(entry)
        self.send(json.dumps(found))

    def resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        sha, files = self.at(self.repo(kind, name), revision)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if path not in files:
            refusal = Refusal(404, "Entry not found", "EntryNotFound")
            refusal.headers |= headers
            raise refusal
        body = files[path]
        headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
            self.send(body[start : end + 1], 206, headers | {"Content-Range": f"bytes {start}-{end}/{len(body)}"})
        elif self.command == "HEAD":
            self.send(b"", 200, headers | {"Content-Length": str(len(body))})
        else:
            self.send(body, 200, headers)


_REPO = r"(models|datasets)/([^/]+/[^/]+)"
_PAGE = r"(datasets/|)((?!api/)[^/]+/[^/]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    ("POST /api/repos/create", Handler.create),
    ("POST /api/validate-yaml", Handler.validate),
    (f"POST /api/{_REPO}/branch/(.+)", Handler.branch),
    (f"POST /api/{_REPO}/preupload/([^/]+)", Handler.preupload),
    (f"POST /api/{_REPO}/commit/([^/]+)", Handler.commit),
    (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT /lfs/([0-9a-f]+)/upload", Handler.upload),
    ("POST /lfs/([0-9a-f]+)/verify", Handler.verify),
    (f"GET /api/{_REPO}", Handler.info),
    (f"GET /api/{_REPO}/revision/([^/]+)", Handler.info),
    (f"GET /api/{_REPO}/tree/([^/]+)(/.*)?", Handler.tree),
    (f"(?:GET|HEAD) /{_PAGE}/resolve/([^/]+)/(.+)", Handler.resolve),
]


@contextmanager
def serve() -> Iterator[Hub]:
    """Serve an empty Hub; its `url` is HF_ENDPOINT for the clients."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Serving", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
