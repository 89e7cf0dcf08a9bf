"""`mlx-empire open` as a process of its own, and what it answers."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit


class Answer(NamedTuple):
    """What came back; names of headers in small letters."""

    status: int
    headers: dict[str, str]
    body: str


class Server(NamedTuple):
    """A page that is served: the addresses as printed, the port."""

    addresses: list[str]
    port: int
    process: subprocess.Popen[str]

    @property
    def base(self) -> str:
        """The address on this machine."""
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, *, method: str = "GET", **headers: str) -> Answer:
        """Ask for a path, as it stands."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, found, answer.read().decode())
        finally:
            connection.close()

    def events(self, path: str, count: int) -> list[dict[str, Any]]:
        """The first messages of a stream."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path)
            answer, found = connection.getresponse(), []
            while len(found) < count:
                line = answer.readline().decode()
                if line.startswith("data: "):
                    found.append(json.loads(line.removeprefix("data: ")))
            return found
        finally:
            connection.close()


@contextmanager
def served(folder: Path, *options: str) -> Iterator[Server]:
    """The page of `folder` at a free port."""
    command = [sys.executable, "-u", "-m", "mlx_empire", "open", str(folder), "--no-browser", *options]
    environment = os.environ | {"PYTHONWARNINGS": "error"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    addresses = []
    try:
        while (line := process.stdout.readline().strip()).startswith("http"):
            addresses.append(line)
        assert addresses, line
        yield Server(addresses, urlsplit(addresses[0]).port or 0, process)
    finally:
        process.terminate()
        process.wait(timeout=60)
