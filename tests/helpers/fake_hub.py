"""A hub on this machine: enough of its protocol to fetch models and data sets, and to be refused them."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "c0ffee" * 6 + "c0ff"


class FakeHub:
    """Serves folders, or texts by file name, as repositories.

    Attributes:
        repositories: hub id -> folder of a model, or files of a data set.
        statuses: hub id -> (HTTP status, ``X-Error-Code`` or None) to answer every request with.
        gated: hub ids whose files need a permission; their description is public.
        broken: whether every request fails.
        requests: the paths asked for so far.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Path | dict[str, str]] = {}
        self.statuses: dict[str, tuple[int, str | None]] = {}
        self.gated: set[str] = set()
        self.broken = False
        self.requests: list[str] = []
        self.url = ""

    @contextmanager
    def serving(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def files(self, name: str) -> dict[str, bytes]:
        found = self.repositories.get(name, {})
        if isinstance(found, dict):
            return {file: text.encode() for file, text in found.items()}
        return {item.name: item.read_bytes() for item in sorted(found.iterdir()) if item.is_file()}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _send(self, status, content=b"{}", *, error=None, **headers):
        headers |= {"Content-Length": len(content), "X-Repo-Commit": COMMIT}
        if error:
            headers |= {"X-Error-Code": error, "X-Error-Message": "refused by the fake hub"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value):
        self._send(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _answer(self):
        hub, body = self.hub, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(path)
        api, parts = path.startswith("/api/"), path.removeprefix("/api").strip("/").split("/")
        parts = parts[parts[0] in ("models", "datasets") :]
        name, kind, revision = "/".join(parts[:2]), *(*parts[2:4], "", "")[:2]
        below = "/".join(parts[4:])
        if hub.broken or name in hub.statuses:
            status, error = (500, None) if hub.broken else hub.statuses[name]
            return self._send(status, error=error)
        if name in hub.gated and not api:
            return self._send(401, error="GatedRepo")
        if name not in hub.repositories and name not in hub.gated:
            return self._send(401, error="RepoNotFound")
        if kind and revision not in ("main", COMMIT):
            return self._send(404, error="RevisionNotFound")
        files = hub.files(name)
        entries = [
            {"type": "file", "path": file, "size": len(content), "oid": _etag(content)}
            for file, content in files.items()
        ]
        if api and kind in ("", "revision"):
            siblings = [{"rfilename": one["path"], "size": one["size"]} for one in entries]
            return self._json({"id": name, "sha": COMMIT, "siblings": siblings})
        if api and kind == "tree":
            return self._json([one for one in entries if one["path"].startswith(below)])
        if api and kind == "paths-info":
            wanted = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
            return self._json([one for one in entries if one["path"] in wanted["paths"]])
        if not api and kind == "resolve" and below in files:
            return self._send(200, files[below], ETag=f'"{_etag(files[below])}"')
        return self._send(404, error="EntryNotFound")

    do_GET = do_HEAD = do_POST = _answer


def use_hub(url: str, patch: pytest.MonkeyPatch) -> None:
    """Make ``url`` the hub, as ``HF_ENDPOINT`` does when it is set before the client is imported."""
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
