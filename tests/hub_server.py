"""A small Hugging Face hub on this machine, which can be told to misbehave."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories of files, ``{repo: {name: bytes}}``; large ones are announced as LFS files with their SHA-256.

    ``faults[name]``: "cut" breaks the connection in the middle (once), "always cut" every time, "truncate" sends half
    a file as if it were whole, "corrupt" changes one byte. ``log`` lists (method, path, range) of every request.
    ``announced[name]`` replaces the size that the hub says a file has.
    """

    def __init__(self, repos: dict[str, dict[str, bytes]]) -> None:
        self.repos, self.faults, self.announced = repos, {}, {}
        self.log: list[tuple[str, str, str | None]] = []
        self.gated: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *args) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def sha(self, repo: str) -> str:
        """The commit: it changes with the contents."""
        digest = hashlib.sha1(usedforsecurity=False)
        for name, content in sorted(self.repos[repo].items()):
            digest.update(name.encode() + content)
        return digest.hexdigest()

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        self.log.append((request.command, path, request.headers.get("Range")))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path):
            self._listing(request, *found.groups())
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(request, *found.groups(), body)
        else:
            self._error(request, 404, "EntryNotFound")

    def _refused(self, request, repo: str, revision: str) -> bool:
        if repo not in self.repos:
            self._error(request, 404, "RepoNotFound")
        elif repo in self.gated:
            self._error(request, 403, "GatedRepo")
        elif revision not in ("main", "v1", self.sha(repo)):
            self._error(request, 404, "RevisionNotFound")
        else:
            return False
        return True

    def _listing(self, request, repo: str, what: str, revision: str) -> None:
        if self._refused(request, repo, revision):
            return
        files = []
        for name, content in self.repos[repo].items():
            size, oid, sha256 = self.announced.get(name, len(content)), blob_id(content), lfs(content)
            pointer = {"size": size, "pointerSize": 130} if sha256 else None
            if what == "tree":
                files.append({"type": "file", "path": name, "size": size, "oid": oid})
                files[-1] |= {"lfs": pointer | {"oid": sha256}} if pointer else {}
            else:
                files.append({"rfilename": name, "size": size, "blobId": oid})
                files[-1] |= {"lfs": pointer | {"sha256": sha256}} if pointer else {}
        whole = {"id": repo, "modelId": repo, "sha": self.sha(repo), "siblings": files, "tags": [], "private": False}
        content = json.dumps(files if what == "tree" else whole).encode()
        self._send(request, 200, {"Content-Type": "application/json", "Content-Length": len(content)}, content)

    def _file(self, request, repo: str, revision: str, name: str, body: bool) -> None:
        if self._refused(request, repo, revision):
            return
        content = self.repos[repo].get(name)
        if content is None:
            return self._error(request, 404, "EntryNotFound")
        fault = self.faults.get(name)
        headers = {"X-Repo-Commit": self.sha(repo), "ETag": f'"{lfs(content) or blob_id(content)}"'}
        headers |= {"Accept-Ranges": "bytes"}
        if fault == "corrupt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault == "truncate" and body:
            content = content[: len(content) // 2]
        start, status = 0, 200
        if body and (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")):
            start, status = int(asked[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        headers["Content-Length"] = len(content) - start
        part = content[start:] if body else b""
        if body and fault in ("cut", "always cut"):
            part = part[: len(part) // 2]
            request.close_connection = True
            if fault == "cut":
                del self.faults[name]
        self._send(request, status, headers, part)

    def _error(self, request, status: int, code: str) -> None:
        self._send(request, status, {"X-Error-Code": code, "X-Error-Message": code, "Content-Length": 0}, b"")

    def _send(self, request, status: int, headers: dict, content: bytes) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, str(value))
        request.end_headers()
        request.wfile.write(content)


def lfs(content: bytes) -> str | None:
    """Files above a kilobyte are LFS files here."""
    return hashlib.sha256(content).hexdigest() if len(content) > 1000 else None


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
