"""A server that speaks the Hub's routes, and a cache as its client leaves it: models by name, with no network."""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

Files = Mapping[str, bytes]
SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by name, each with the files of each commit and the commit of each branch."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Files]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.breaks: set[str] = set()  # files whose download breaks off
        self.endpoint = ""

    def push(self, repository: str, files: Files, branch: str = "main", sha: str = SHA) -> None:
        self.commits.setdefault(repository, {})[sha] = files
        self.branches.setdefault(repository, {})[branch] = sha

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """The status, headers and content at a path."""
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path):
            repository, kind, revision = match.groups()
            if repository not in self.commits:
                return 401, {"X-Error-Code": "RepoNotFound"}, b""
            sha = self.branches[repository].get(revision, revision)
            if sha not in self.commits[repository]:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            files = self.commits[repository][sha]
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": _oid(data)} for name, data in files.items()
            ]
            return 200, {}, json.dumps(tree if kind == "tree" else {"id": repository, "sha": sha}).encode()
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repository, revision, name = match.groups()
            if repository in self.gated:
                return 403, {"X-Error-Code": "GatedRepo"}, b""
            if repository not in self.commits:
                return 401, {"X-Error-Code": "RepoNotFound"}, b""
            sha = self.branches[repository].get(revision, revision)
            if sha not in self.commits[repository]:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            if name not in self.commits[repository][sha]:
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}, b""
            data = self.commits[repository][sha][name]
            return 200, {"X-Repo-Commit": sha, "ETag": f'"{_oid(data)}"'}, data
        return 404, {}, b""


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A Hub on a free port of this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            status, headers, data = hub.answer(path)
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                broken = path.rpartition("/")[2] in hub.breaks
                self.wfile.write(data[: len(data) // 2] if broken else data)
                self.close_connection = broken

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def cached(cache: Path, repository: str, files: Files, sha: str = SHA) -> Path:
    """The snapshot of a repository in a cache, whose main branch it is."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / sha
    snapshot.mkdir(parents=True)
    for name, data in files.items():
        (snapshot / name).write_bytes(data)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(sha)
    return snapshot
