"""A stand-in for the Hugging Face hub on this machine: repositories of files, over HTTP.

It answers what huggingface_hub asks to download a snapshot and to commit a folder, no more.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclasses.dataclass
class Repository:
    """A repository with one commit, which `main` and any of `tags` name."""

    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    tags: tuple[str, ...] = ()
    gated: bool = False
    private: bool = False
    commits: list[str] = dataclasses.field(default_factory=list)  # Messages.

    @property
    def sha(self) -> str:
        parts = (name.encode() + data for name, data in sorted(self.files.items()))
        return hashlib.sha1(b"".join(parts)).hexdigest()

    def has(self, revision: str) -> bool:
        return revision in ("main", self.sha, *self.tags)


@dataclasses.dataclass
class Hub:
    """The server's repositories by name, and the requests that it got ("GET /path")."""

    repositories: dict[str, Repository] = dataclasses.field(default_factory=dict)
    requests: list[str] = dataclasses.field(default_factory=list)
    endpoint: str = ""

    def add_folder(self, name: str, folder: Path, **fields: Any) -> Repository:
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        self.repositories[name] = Repository(files, **fields)
        return self.repositories[name]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = asked.get("organization") or "me"
            name = f"{name}/{asked['name']}" if "/" not in asked["name"] else asked["name"]
            if name in self.hub.repositories:
                self._send(409, {"error": "it exists", "url": f"{self.hub.endpoint}/{name}"})
                return
            private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.repositories[name] = Repository(private=bool(private))
            self._send(200, {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name})
        elif path == "/api/validate-yaml":  # Of a model card's head.
            self._send(200, {"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([a-z]+)(?:/([^/]+))?)?", path):
            self._answer_api(match[1], match[2] or "revision", match[3] or "main", body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._answer_file(*match.groups())
        else:
            self._send(404, {"error": f"no such address: {path}"})

    def _find(self, name: str, revision: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._refuse(404, "RepoNotFound")
        elif not repository.has(revision):
            self._refuse(404, "RevisionNotFound")
        elif repository.gated:
            self._refuse(403, "GatedRepo")
        else:
            return repository
        return None

    def _answer_api(self, name: str, kind: str, revision: str, body: bytes) -> None:
        repository = self._find(name, revision)
        if repository is None:
            return
        if kind == "revision":
            siblings = [{"rfilename": file} for file in repository.files]
            about = {"id": name, "modelId": name, "sha": repository.sha, "siblings": siblings}
            self._send(200, {**about, "private": repository.private, "tags": [], "downloads": 0})
        elif kind == "tree":
            entries = [
                {"type": "file", "path": file, "size": len(data), "oid": _oid(data)}
                for file, data in repository.files.items()
            ]
            self._send(200, entries)
        elif kind == "preupload":
            files = json.loads(body)["files"]
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in files
            ]
            self._send(200, {"files": modes})
        elif kind == "commit":
            for line in map(json.loads, body.splitlines()):
                key, value = line["key"], line["value"]
                if key == "header":
                    repository.commits.append(value["summary"])
                elif key == "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                elif key == "deletedFile":
                    del repository.files[value["path"]]
            address = f"{self.hub.endpoint}/{name}/commit/{repository.sha}"
            self._send(200, {"success": True, "commitUrl": address, "commitOid": repository.sha})
        else:
            self._send(404, {"error": f"no such request: {kind}"})

    def _answer_file(self, name: str, revision: str, file: str) -> None:
        repository = self._find(name, revision)
        if repository is None:
            return
        if file not in repository.files:
            self._refuse(404, "EntryNotFound")
            return
        data = repository.files[file]
        headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": repository.sha}
        self._send(200, data, headers)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextlib.contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serves an empty hub on a free port of this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
