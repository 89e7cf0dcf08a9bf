"""Quick files of rows, and the command run in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.rows import writer
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
    """`support.rows.writer` of the temporary folder."""
    return writer(tmp_path)
