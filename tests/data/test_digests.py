"""Large data is hashed once: notes count while a file is as it was, and not for a run that goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.data import cache, digests
from mlx_empire.data.splits import Splits, load_splits
from mlx_empire.recipe.load import parse_recipe
from mlx_empire.run import shared_rows

ROWS = [{"tokens": list(range(n, n + 9))} for n in range(20)]
RECIPE = """\
model: {path: m}
data: {path: d, sequence_length: 4, format: tokens}
batch: {global_size: 2}
optimizer: {learning_rate: 1.0}
run: {dir: r, steps: 2}
"""


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was hashed, byte by byte; all files are large and settled here."""
    seen: list[str] = []
    monkeypatch.setattr(digests, "LEAST_BYTES", 0)
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -60)
    by_bytes, by_array = cache.file_digest, cache._file_digest

    def of_file(file: Path) -> str:
        if file.suffix == ".jsonl":  # else our own code
            seen.append("file_digest")
        return by_bytes(file)

    def of_array(file: Path, array: np.ndarray, offset: int) -> str:
        seen.append("_file_digest")
        return by_array(file, array, offset)

    monkeypatch.setattr(cache, "file_digest", of_file)
    monkeypatch.setattr(cache, "_file_digest", of_array)
    return seen


def loaded(path: Path, *, thorough: bool = False) -> Splits:
    return load_splits(path=path, sequence_length=4, thorough=thorough)


def test_what_did_not_change_is_not_hashed_again(write: Callable[..., Path], hashed: list[str]) -> None:
    path = write("a.jsonl", *ROWS)
    first = loaded(path)
    assert set(hashed) == {"file_digest", "_file_digest"}
    hashed.clear()
    again = loaded(path)
    assert hashed == []
    assert again.digest == first.digest
    assert again.train.row(3).inputs.tolist() == first.train.row(3).inputs.tolist()
    assert loaded(path, thorough=True).digest == first.digest
    assert sorted(hashed) == ["_file_digest"] * 4 + ["file_digest"]


def test_another_file_of_the_same_size_and_time_is_seen(
    write: Callable[..., Path], hashed: list[str]
) -> None:
    path = write("a.jsonl", *ROWS)
    first, before = loaded(path), path.stat()
    other = write("b.jsonl", *reversed(ROWS))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert loaded(path).digest != first.digest


def test_damage_in_the_cache_is_seen_where_the_file_changed(
    write: Callable[..., Path], hashed: list[str], own_cache: Path
) -> None:
    path = write("a.jsonl", *ROWS)
    first = loaded(path)
    (tokens,) = (own_cache / "tokens").glob("*/train.tokens.npy")
    raw = bytearray(tokens.read_bytes())
    raw[-1] ^= 1
    tokens.write_bytes(raw)
    os.utime(tokens, ns=(0, 1))  # a coarse clock must not hide it
    rebuilt = loaded(path)
    assert rebuilt.digest == first.digest
    assert not rebuilt.report[-1].startswith("tokens read from the cache")
    assert loaded(path).report[-1].startswith("tokens read from the cache")


@pytest.mark.parametrize("how", ["fresh", "small", "broken", "unwritable"])
def test_without_a_note_a_file_is_hashed(
    write: Callable[..., Path], hashed: list[str], own_cache: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "fresh":
        monkeypatch.setattr(digests, "SETTLED_SECONDS", 1e9)
    if how == "small":
        monkeypatch.setattr(digests, "LEAST_BYTES", 2**24)
    if how == "unwritable":
        own_cache.mkdir()
        (own_cache / "digests").write_text("a file")
    path = write("a.jsonl", *ROWS)
    first = loaded(path)
    for note in (own_cache / "digests").glob("*.json") if how == "broken" else ():
        note.write_text("[")
    hashed.clear()
    assert loaded(path).digest == first.digest
    assert hashed.count("file_digest") == 1


@pytest.mark.parametrize(
    ("asked", "begun", "thorough"),
    [
        ("auto", None, False),
        ("auto", "metrics.jsonl", True),
        ("auto", "checkpoints", True),
        ("never", "metrics.jsonl", False),
        ("3", None, True),
    ],
)
def test_a_run_that_goes_on_reads_every_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, begun: str | None, thorough: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    if begun is not None:
        (Path("r") / begun).mkdir(parents=True)
    told: list[bool] = []

    def load(**options: Any) -> Splits:
        told.append(options["thorough"])
        return Splits(None, None, [], "d")  # type: ignore[arg-type]

    monkeypatch.setattr(shared_rows, "load_splits", load)
    recipe = parse_recipe(RECIPE, "x", [f"run.resume={asked}"])
    spec: Any = SimpleNamespace(text_config={"vocab_size": 9})
    shared_rows.share_data(SoloCommunicator("here"), recipe, spec)
    assert told == [thorough]
