"""A Hub of our own on this machine, for the real client: repositories, commits, large files, downloads and faults."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_TheTokenOfTheTest0123456789"
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repository:
    """Files of the branch main, each commit with all of them."""

    private: bool
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)  # hash, message, files

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][2]

    def add(self, message: str, files: dict[str, bytes]) -> str:
        commit = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append((commit, message, files))
        return commit

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            revision = self.commits[-1][0]
        return next(((commit, files) for commit, _, files in self.commits if commit == revision), None)


class Hub:
    """The server's content, what was asked of it, and what is to go wrong.

    Attributes:
        requests: `METHOD path -> status` of every request.
        faults: `(pattern of "METHOD path", status or "drop", times)`: drop reads half of the body and hangs up.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[tuple[str, int | str, int]] = []
        self.hosts: set[str] = set()
        self.lock = threading.Lock()

    def fault(self, request: str) -> int | str | None:
        with self.lock:
            for index, (pattern, what, times) in enumerate(self.faults):
                if times and re.search(pattern, request):
                    self.faults[index] = (pattern, what, times - 1)
                    return what
        return None


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".pt", ".pth", ".png"))


def oid(path: str, content: bytes) -> str:
    """As git knows a file: by sha1 of the blob, a large one by sha256."""
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.hosts.add(self.headers["Host"])
        length = int(self.headers.get("Content-Length") or 0)
        fault = self.hub.fault(request)
        if fault == "drop":
            self.rfile.read(length // 2)
            self.hub.requests.append(f"{request} -> connection dropped")
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(length)
        if fault is not None:
            self._answer(request, int(fault), {"error": f"fault {fault} as ordered"})
            return
        for method, pattern, answer in _ROUTES:
            if method == self.command and (found := re.fullmatch(pattern, path)):
                status, value, *headers = answer(self, body, **found.groupdict())
                self._answer(request, status, value, dict(*headers))
                return
        self._answer(request, 404, {"error": "no such route"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _answer(self, request: str, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self.hub.requests.append(f"{request} -> {status}")
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _base(self) -> str:
        return f"http://{self.headers['Host']}"

    def _refused(self, repo: str, write: bool) -> tuple[Any, ...] | None:
        """As the Hub: a private repository is not there for who may not read it."""
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        repository = self.hub.repositories.get(repo)
        if repository is None or (repository.private and not known):
            return 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        return (401, {"error": "Invalid username or password."}) if write and not known else None

    # --- answers ------------------------------------------------------------------------------------------------

    def create(self, body: bytes) -> tuple[Any, ...]:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
        answer = {"url": f"{self._base()}/{repo}", "name": repo, "id": repo}
        if repo in self.hub.repositories:
            return 409, {**answer, "error": "You already created this model repo"}
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.repositories[repo] = Repository(private)
        self.hub.repositories[repo].add("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return 200, answer

    def validate(self, body: bytes) -> tuple[Any, ...]:
        header = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], flags=re.DOTALL)
        try:
            valid = header is not None and isinstance(yaml.safe_load(header[1]), dict)
        except yaml.YAMLError:
            valid = False
        errors = [] if valid else [{"message": "the card's metadata are not YAML"}]
        return 200 if valid else 400, {"errors": errors, "warnings": []}

    def preupload(self, body: bytes, repo: str, revision: str) -> tuple[Any, ...]:
        if refused := self._refused(repo, write=True):
            return refused
        present = self.hub.repositories[repo].files
        files = [
            {
                "path": path,
                "uploadMode": "lfs" if is_large(path) else "regular",
                "shouldIgnore": False,
                "oid": oid(path, present[path]) if path in present else None,
            }
            for path in (file["path"] for file in json.loads(body)["files"])
        ]
        return 200, {"files": files}

    def batch(self, body: bytes, repo: str) -> tuple[Any, ...]:
        if refused := self._refused(repo, write=True):
            return refused
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self._base()}/large/{asked['oid']}"}}
            objects.append({**asked} if asked["oid"] in self.hub.large else {**asked, "actions": upload})
        return 200, {"transfer": "basic", "objects": objects}

    def put(self, body: bytes, large: str) -> tuple[Any, ...]:
        if hashlib.sha256(body).hexdigest() != large:
            return 422, {"error": "another content"}
        self.hub.large[large] = body
        return 200, {}

    def commit(self, body: bytes, repo: str, revision: str) -> tuple[Any, ...]:
        if refused := self._refused(repo, write=True):
            return refused
        header, *operations = [json.loads(line) for line in body.splitlines()]
        repository = self.hub.repositories[repo]
        files = dict(repository.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        commit = repository.add(header["value"]["summary"], files)
        return 200, {"commitUrl": f"{self._base()}/{repo}/commit/{commit}", "commitOid": commit, "success": True}

    def info(self, body: bytes, repo: str, revision: str = "main") -> tuple[Any, ...]:
        if refused := self._refused(repo, write=False):
            return refused
        found = self.hub.repositories[repo].at(revision)
        if found is None:
            return 404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"}
        siblings = [{"rfilename": path} for path in found[1]]
        private = self.hub.repositories[repo].private
        return 200, {
            "id": repo,
            "modelId": repo,
            "sha": found[0],
            "private": private,
            "siblings": siblings,
            "tags": [],
        }

    def tree(self, body: bytes, repo: str, revision: str, folder: str = "") -> tuple[Any, ...]:
        if refused := self._refused(repo, write=False):
            return refused
        found = self.hub.repositories[repo].at(revision)
        if found is None:
            return 404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"}
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": oid(path, content)}
            for path, content in found[1].items()
            if path.startswith(folder)
        ]
        if entries or not folder:
            return 200, entries
        return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> tuple[Any, ...]:
        if refused := self._refused(repo, write=False):
            return refused
        found = self.hub.repositories[repo].at(revision)
        if found is None:
            return 404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"}
        if path not in found[1]:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found[0]}
        content = found[1][path]
        return 200, content, {"X-Repo-Commit": found[0], "ETag": f'"{oid(path, content)}"'}


_ROUTES = (
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/large/(?P<large>\w+)", _Handler.put),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("GET", rf"/api/models/{_REPO}", _Handler.info),
    ("GET", rf"/api/models/{_REPO}/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)/(?P<folder>.+)", _Handler.tree),
    ("GET", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    ("HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
)


@contextmanager
def running_hub() -> Iterator[tuple[Hub, str]]:
    """The Hub and its address; it ends with the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
