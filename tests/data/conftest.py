"""Shared by the tests of `mlx_empire.data`: a cache of their own, the small tokenizer, quick files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_empire.data.encode import load_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_EMPIRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    return FIXTURES


@pytest.fixture(scope="session")
def tokenizer_folder() -> Path:
    return FIXTURES / "tiny-llama-260k"


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write("train.jsonl", row, row, ...): a JSON-lines file; strings are written as they are."""

    def write_rows(name: str, *rows: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write_rows
