"""A small Hugging Face hub on the loopback: the endpoints that a download of a model uses.

`GET /api/models/<id>[/revision/<rev>]` and `HEAD`/`GET /<id>/resolve/<rev>/<path>`, with the headers that
`huggingface_hub` reads: X-Repo-Commit, ETag, X-Error-Code, ranges.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"


@dataclass
class Repository:
    """Files by revision; `token` is what a gated one asks for."""

    commits: dict[str, Path]
    branches: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    token: str | None = None


@dataclass
class FakeHub:
    """`asked` lists every request for a file, as (method, path in the repository)."""

    repositories: dict[str, Repository]
    url: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)
    breaks: set[str] = field(default_factory=set)
    """Paths whose answer ends in the middle."""

    def fetched(self) -> set[str]:
        """Paths of the files whose bytes were sent."""
        return {path for method, path in self.asked if method == "GET"}

    def use(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        """Point `huggingface_hub` here, with an empty cache below `folder` and without a token."""
        url = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)


@contextmanager
def running_hub(repositories: dict[str, Repository]) -> Iterator[FakeHub]:
    """Serve these repositories by id until the block ends."""
    hub = FakeHub(repositories)

    class Handler(_Handler):
        served = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = False
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        """Tests are quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repository_id, rest = "/".join(parts[2:4]), parts[4:]
        else:
            repository_id, rest = "/".join(parts[:2]), parts[2:]
        repository = self.served.repositories.get(repository_id)
        if repository is None:
            self._refuse(404, "RepoNotFound")
        elif repository.token and self.headers.get("Authorization") != f"Bearer {repository.token}":
            self._refuse(401 if "Authorization" not in self.headers else 403, "GatedRepo")
        elif parts[:2] == ["api", "models"]:
            self._describe(repository_id, repository, rest[1] if rest else "main")
        elif rest[:1] == ["resolve"]:
            self._file(repository, rest[1], "/".join(rest[2:]))
        else:
            self._refuse(404, "EntryNotFound")

    def _describe(self, repository_id: str, repository: Repository, revision: str) -> None:
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            self._refuse(404, "RevisionNotFound")
            return
        folder = repository.commits[commit]
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        siblings = [
            {"rfilename": str(path.relative_to(folder)), "size": path.stat().st_size} for path in files
        ]
        document = {"id": repository_id, "modelId": repository_id, "sha": commit, "siblings": siblings}
        self._send(200, json.dumps(document | {"tags": []}).encode(), {"Content-Type": "application/json"})

    def _file(self, repository: Repository, revision: str, name: str) -> None:
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            self._refuse(404, "RevisionNotFound")
            return
        path = repository.commits[commit] / name
        if not path.is_file():
            self._refuse(404, "EntryNotFound")
            return
        self.served.asked.append((self.command, name))
        data = path.read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        status, begin = 200, 0
        if (wanted := self.headers.get("Range", "")).startswith("bytes="):
            begin = int(wanted.removeprefix("bytes=").partition("-")[0] or 0)
            status = 206
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        is_broken = self.command == "GET" and name in self.served.breaks
        self.served.breaks -= {name} if is_broken else set()
        self._send(status, data[begin:], headers, is_broken=is_broken)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": f"test: {code}"})

    def _send(self, status: int, data: bytes, headers: dict[str, str], *, is_broken: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if is_broken else data)
            self.close_connection = True
