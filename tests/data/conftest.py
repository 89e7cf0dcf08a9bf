"""Shared by the tests of `mlx_empire.data`: a cache of their own, the small tokenizer, quick files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.rows import writer

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
    """`support.rows.writer` of the temporary folder."""
    return writer(tmp_path)
