"""The people whom tests of `serve` ask, and how a running server is asked."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from support.speaking import answers

from mlx_empire.serve.server import Server

PEOPLE: dict[str, dict[str, Any]] = {
    "alice": {"seed": 100},
    "bob": {"seed": 200, "rank": 8, "scale": 1.0},
    "carl": {"seed": 300, "kind": "dora"},
    "dora": {"seed": 400},
}
PROMPTS = ("Once upon a time", "Tom said", "The little dog", "In the garden there was", "She")
TOKENS = 8


class Asked:
    """A server that runs in this process, and how often it read a base."""

    def __init__(self, made: Server, loads: list[str]) -> None:
        self.made, self.url, self.loads = made, made.url, loads

    def get(self, path: str) -> tuple[int, Any]:
        return fetched(urllib.request.Request(f"{self.url}{path}"))

    def ask(self, **body: Any) -> tuple[int, Any]:
        return fetched(post(self.url, body))

    def said(self, name: str, prompt: str) -> str:
        code, found = self.ask(model=name, prompt=prompt, max_tokens=TOKENS)
        assert code == 200, found
        text: str = found["choices"][0]["text"]
        return text


def post(url: str, body: dict[str, Any]) -> urllib.request.Request:
    headers = {"Content-Type": "application/json"}
    return urllib.request.Request(f"{url}/completions", json.dumps(body).encode(), headers)


def fetched(request: urllib.request.Request) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def expected(adapter: Path, *prompts: str) -> list[str]:
    """What mlx-lm alone says with the adapter in a folder."""
    return answers(prompts, adapter, TOKENS)
