"""A Hub on the loopback into which huggingface_hub writes: repositories, and the files of their commits."""

from __future__ import annotations

import base64
import json
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

from support.loopback import LoopbackServer, Quiet

COMMIT = "fedcba9876543210fedcba9876543210fedcba98"


class WrittenHub(LoopbackServer):
    """Repositories by name: `private`, and `files` by theirs. `refuses`: it answers 403 to who would write."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.refuses = False
        hub = self

        class Handler(Quiet):
            def do_GET(self) -> None:
                hub.tell(self)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                hub.take(self, body)

        super().__init__(Handler)

    def tell(self, request: BaseHTTPRequestHandler) -> None:
        name = urlsplit(request.path).path.removeprefix("/api/models/").partition("/revision/")[0]
        if name not in self.private:
            return _send(request, 404, {"error": "no such repository"})
        about = {
            "_id": "1",
            "id": name,
            "modelId": name,
            "sha": COMMIT,
            "private": self.private[name],
            "tags": [],
        }
        return _send(request, 200, {**about, "siblings": [], "downloads": 0, "likes": 0})

    def take(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        path = urlsplit(request.path).path
        if path == "/api/validate-yaml":
            return _send(request, 200, {"errors": [], "warnings": []})
        if self.refuses:
            return _send(request, 403, {"error": "forbidden"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            known = name in self.private
            self.private.setdefault(name, bool(asked.get("private")) or asked.get("visibility") == "private")
            self.files.setdefault(name, {})
            return _send(request, 409 if known else 200, {"url": f"{self.address}/{name}", "id": name})
        name, _, what = path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        if what == "preupload":
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for one in json.loads(body)["files"]
            ]
            return _send(request, 200, {"files": files})
        assert what == "commit"
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{self.address}/{name}/commit/{COMMIT}"
        return _send(request, 200, {"commitUrl": url, "commitOid": COMMIT, "success": True})


def _send(request: BaseHTTPRequestHandler, status: int, value: dict[str, Any]) -> None:
    data = json.dumps(value).encode()
    request.send_response(status)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data)
