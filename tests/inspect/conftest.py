"""Quick files of rows, and the command run in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.saying import said


@pytest.fixture
def say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """What `mlx-empire WORDS` prints in an empty folder; it must end with `code`."""
    monkeypatch.chdir(tmp_path)
    return partial(said, capsys)


@pytest.fixture
def found(say: Callable[..., str]) -> Callable[..., Any]:
    """The document of `mlx-empire inspect WORDS --json`."""

    def ask(*words: object, code: int = 0) -> Any:
        return json.loads(say("inspect", *words, "--json", code=code))

    return ask


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write("train.jsonl", row, row, ...): a file of JSON lines; strings are written as they are."""

    def write_rows(name: str, *rows: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write_rows
