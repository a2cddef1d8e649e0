"""A Hub on this machine: as much of its API as downloads of models and data sets need."""

import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
API = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+)"
    r"(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?$"
)
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


class Hub:
    """A server of repositories.

    repositories: folder by name, `models/owner/name` or `datasets/owner/name`
    commits: of each repository; COMMIT if not named
    asked: the path of each request so far
    """

    cache: Path

    def __init__(self, repositories: dict[str, Path], commits: dict[str, str]) -> None:
        self.repositories, self.commits = repositories, commits
        self.asked: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}
        )
        self._thread.start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Take the network away."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def commit(self, name: str) -> str:
        return self.commits.get(name, COMMIT)


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self._answer(body=True, posted=self.rfile.read(length).decode())

    def _answer(self, body: bool, posted: str = "") -> None:
        path = unquote(self.path.split("?")[0])
        self.hub.asked.append(path)
        if found := API.match(path):
            kind, owner, verb, revision, inside = found.groups()
            name = f"{kind}/{owner}"
            if self._is_there(name, revision):
                self._api(name, verb, inside or "", posted, body)
        elif found := FILE.match(path):
            of_data, owner, revision, inside = found.groups()
            name = f"{'datasets' if of_data else 'models'}/{owner}"
            if self._is_there(name, revision):
                self._file(name, inside, body)
        else:
            self._miss("RepoNotFound")

    def _is_there(self, name: str, revision: str | None) -> bool:
        if name not in self.hub.repositories:
            self._miss("RepoNotFound")
            return False
        if revision not in (None, "main", self.hub.commit(name)):
            self._miss("RevisionNotFound")
            return False
        return True

    def _api(self, name: str, verb: str | None, inside: str, posted: str, body: bool) -> None:
        folder = self.hub.repositories[name]
        if verb in (None, "revision"):
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            siblings = [
                {"rfilename": str(path.relative_to(folder)), "size": path.stat().st_size}
                for path in files
            ]
            owner = name.partition("/")[2]
            facts = {"id": owner, "sha": self.hub.commit(name), "siblings": siblings, "tags": []}
            self._send(name, json.dumps(facts).encode(), body)
            return
        if verb == "paths-info":
            asked = parse_qs(posted).get("paths") or json.loads(posted)["paths"]
            paths = [folder / one for one in asked]
        elif "recursive=true" in self.path.lower():
            paths = sorted((folder / inside).rglob("*"))
        else:
            paths = sorted((folder / inside).iterdir()) if (folder / inside).is_dir() else []
        entries = [
            {
                "type": "directory" if path.is_dir() else "file",
                "path": str(path.relative_to(folder)),
                "size": 0 if path.is_dir() else path.stat().st_size,
                "oid": path.name,
            }
            for path in paths
            if path.exists()
        ]
        self._send(name, json.dumps(entries).encode(), body)

    def _file(self, name: str, inside: str, body: bool) -> None:
        path = self.hub.repositories[name] / inside
        if not path.is_file():
            self._miss("EntryNotFound", **{"X-Repo-Commit": self.hub.commit(name)})
            return
        content, start = path.read_bytes(), 0
        if asked := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(asked[1])
        headers = {"ETag": f'"{path.name}"'}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(name, content[start:], body, 206 if start else 200, **headers)

    def _miss(self, what: str, **headers: str) -> None:
        self.send_response(404)
        for key, value in {"X-Error-Code": what, "Content-Length": "0", **headers}.items():
            self.send_header(key, value)
        self.end_headers()

    def _send(
        self, name: str, content: bytes, body: bool, status: int = 200, **headers: str
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("X-Repo-Commit", self.hub.commit(name))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(repositories: dict[str, Path], commits: dict[str, str] | None = None) -> Iterator[Hub]:
    """Serve repositories while the block lasts."""
    hub = Hub(repositories, commits or {})
    try:
        yield hub
    finally:
        hub.close()


def use(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process take the hub for the Hub, with an empty cache in a folder."""
    import datasets
    import huggingface_hub

    hub.cache, constants = cache, huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.address)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
