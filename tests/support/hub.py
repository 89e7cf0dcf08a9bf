"""A Hub on the loopback: what huggingface_hub asks of one, with the faults that networks and disks have."""

from __future__ import annotations

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

from support.loopback import LoopbackServer, Quiet

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StubHub(LoopbackServer):
    """One repository at one commit, of `kind` models or datasets.

    `cut`: names whose connection ends in the middle, once; `wrong`: names of which one byte is another, until they are
    taken out; `gated`, `down`: it answers 403, 503. `ranges`: (name, Range) of every GET.
    """

    def __init__(
        self, repository: str, files: dict[str, bytes], large: tuple[str, ...] = (), kind: str = "models"
    ) -> None:
        self.repository, self.files, self.large, self.kind = repository, files, large, kind
        self.cut: set[str] = set()
        self.wrong: set[str] = set()
        self.gated = self.down = False
        self.ranges: list[tuple[str, str | None]] = []
        hub = self

        class Handler(Quiet):
            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

        super().__init__(Handler)

    def sha256(self, name: str) -> str:
        return hashlib.sha256(self.files[name]).hexdigest()

    def git_sha1(self, name: str) -> str:
        data = self.files[name]
        return hashlib.sha1(b"blob %d\0%s" % (len(data), data)).hexdigest()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = urlsplit(request.path).path
        api = f"/api/{self.kind}/{self.repository}"
        if self.down:
            return self._send(request, 503, b"", body, {})
        if self.gated:
            return self._send(request, 403, b"", body, {"X-Error-Code": "GatedRepo"})
        if re.fullmatch(rf"{api}/revision/(main|{COMMIT})", path):
            return self._json(request, self._info(), body)
        if path.startswith(f"{api}/revision/"):
            return self._send(request, 404, b"", body, {"X-Error-Code": "RevisionNotFound"})
        if path == f"{api}/tree/{COMMIT}":
            return self._json(request, [self._entry(name) for name in self.files], body)
        folder = "" if self.kind == "models" else f"/{self.kind}"
        asked = re.fullmatch(rf"{folder}/{self.repository}/resolve/(?:main|{COMMIT})/(.+)", path)
        if asked and asked[1] in self.files:
            return self._file(request, asked[1], body)
        if asked or path.startswith(f"{api}/tree/{COMMIT}/"):
            return self._send(request, 404, b"", body, {"X-Error-Code": "EntryNotFound"})
        return self._send(request, 404, b"", body, {"X-Error-Code": "RepoNotFound"})

    def _info(self) -> dict[str, object]:
        siblings = []
        for name, data in self.files.items():
            one: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": self.git_sha1(name)}
            if name in self.large:
                one["lfs"] = {"sha256": self.sha256(name), "size": len(data), "pointerSize": 134}
            siblings.append(one)
        card = {"license": "other", "license_name": "stub-licence"}
        return {
            "_id": "1", "id": self.repository, "modelId": self.repository, "sha": COMMIT, "gated": False,
            "private": False, "siblings": siblings, "cardData": card, "tags": [], "downloads": 0, "likes": 0,
        }  # fmt: skip

    def _entry(self, name: str) -> dict[str, object]:
        data = self.files[name]
        entry: dict[str, object] = {
            "type": "file",
            "path": name,
            "size": len(data),
            "oid": self.git_sha1(name),
        }
        if name in self.large:
            entry["lfs"] = {"oid": self.sha256(name), "size": len(data), "pointerSize": 134}
        return entry

    def _file(self, request: BaseHTTPRequestHandler, name: str, body: bool) -> None:
        data = self.files[name]
        if name in self.wrong:
            data = data[:-1] + bytes([data[-1] ^ 1])
        etag = self.sha256(name) if name in self.large else self.git_sha1(name)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}
        if not body:
            return self._send(request, 200, data, body, headers)
        wanted = request.headers.get("Range")
        self.ranges.append((name, wanted))
        status, first = 200, 0
        if wanted is not None:
            status, first = 206, int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        rest = data[first:]
        if name in self.cut:
            self.cut.discard(name)
            return self._send(request, status, rest[: len(rest) // 2], body, headers, promised=len(rest))
        return self._send(request, status, rest, body, headers)

    def _json(self, request: BaseHTTPRequestHandler, value: object, body: bool) -> None:
        self._send(request, 200, json.dumps(value).encode(), body, {"Content-Type": "application/json"})

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        data: bytes,
        body: bool,
        headers: dict[str, str],
        promised: int | None = None,
    ) -> None:
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(data) if promised is None else promised))
        request.end_headers()
        if body:
            request.wfile.write(data)
        if promised is not None:
            request.close_connection = True
