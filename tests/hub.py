"""A small local Hub with the API of the real one, for code that downloads and pushes."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import reset_sessions


class Hub:
    """Server for models in a directory, which also accepts pushed models.

    Attributes:
        folder: root of the served files, `ROOT/owner/name/FILE`. A model exists once its directory exists.
        url: the server's address, known to huggingface_hub in this process and, as HF_ENDPOINT, in child processes.
        requests: method and path of each request so far, e.g. `HEAD /owner/name/resolve/COMMIT/config.json`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.requests = folder, list[str]()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def model(self, name: str) -> Path:
        """Return the directory of the model `owner/name`, created on first use; tests write files into it."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def files(self, name: str) -> dict[str, bytes]:
        """Read the files of a model, by path."""
        folder = self.folder / name
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    def commit(self, name: str) -> str:
        """Return the commit of `main`, which changes with the files."""
        return hashlib.sha1(repr(self.files(name)).encode()).hexdigest()

    def close(self) -> None:
        """Stop the server, so that the Hub cannot be reached."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Handler(BaseHTTPRequestHandler):
    """Handler of one request. HTTP/1.0, so that no connection stays open."""

    def __init__(self, hub: Hub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self._path()
        if path[:2] == ["api", "models"] and path[4:5] in ([], ["revision"]):
            name, revision = "/".join(path[2:4]), (path[5:] or ["main"])[0]
            if self._exists(name, revision):
                siblings = [{"rfilename": file} for file in self.hub.files(name)]
                self._json(200, {"id": name, "sha": self.hub.commit(name), "siblings": siblings, "tags": []})
        elif path[4:5] == ["tree"]:
            if self._exists("/".join(path[2:4]), path[5]):
                files = self.hub.files("/".join(path[2:4])).items()
                self._json(200, [{"type": "file", "path": f, "size": len(b), "oid": "0"} for f, b in files])
        elif path[2:3] == ["resolve"]:
            self._file("/".join(path[:2]), path[3], "/".join(path[4:]))
        else:
            self._json(501, {"error": f"this hub does not support GET {self.path}"})

    def do_POST(self) -> None:
        path, body = self._path(), self.rfile.read(int(self.headers["Content-Length"]))
        name = "/".join(path[2:4])
        if path == ["api", "repos", "create"]:
            request = json.loads(body)
            name = f"{request['organization'] or 'me'}/{request['name']}"
            status = 409 if (self.hub.folder / name).exists() else 200
            self.hub.model(name)
            self._json(status, {"url": f"{self.hub.url}/{name}"})
        elif path == ["api", "validate-yaml"]:
            self._json(200, {"errors": [], "warnings": []})
        elif path[4:5] == ["preupload"] and self._exists(name, path[5]):
            files = [{"path": file["path"]} for file in json.loads(body)["files"]]
            self._json(200, {"files": [file | {"uploadMode": "regular", "shouldIgnore": False} for file in files]})
        elif path[4:5] == ["commit"] and self._exists(name, path[5]):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "deletedFile":
                    (self.hub.model(name) / line["value"]["path"]).unlink()
                if line["key"] == "file":
                    target = self.hub.model(name) / line["value"]["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(line["value"]["content"]))
            commit = self.hub.commit(name)
            self._json(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})
        elif path[4:5] not in (["preupload"], ["commit"]):
            self._json(501, {"error": f"this hub does not support POST {self.path}"})

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""

    def _path(self) -> list[str]:
        self.hub.requests.append(f"{self.command} {self.path}")
        return unquote(urlsplit(self.path).path).strip("/").split("/")

    def _exists(self, name: str, revision: str) -> bool:
        """Return True if the model has this revision; otherwise answer the request with an error."""
        if not (self.hub.folder / name).is_dir():
            self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", self.hub.commit(name)):
            self._json(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            return True
        return False

    def _file(self, name: str, revision: str, file: str) -> None:
        if not self._exists(name, revision):
            return
        commit = {"X-Repo-Commit": self.hub.commit(name)}
        content = self.hub.files(name).get(file)
        if content is None:
            self._json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"} | commit)
        else:
            self._answer(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'} | commit)

    def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub without models, with its own cache. huggingface_hub sends no requests elsewhere, and no token."""
    hub, cache = Hub(tmp_path / "hub"), str(tmp_path / "hub_cache")
    files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    # huggingface_hub reads the environment on import, so its constants are patched too.
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    for key, value in {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": cache, "HF_HUB_OFFLINE": "0", "no_proxy": "*"}.items():
        monkeypatch.setenv(key, value)
    reset_sessions()
    yield hub
    hub.close()
    reset_sessions()
