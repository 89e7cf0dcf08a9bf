"""Tokens stream to disk: what comes out is what is laid out in memory, byte for byte, and little is held on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_empire.data import splits, stream
from mlx_empire.data.encode import Document
from mlx_empire.data.order import fixed_permutation
from mlx_empire.data.rows import Counts, build_table
from mlx_empire.data.splits import end_held_out, held_out_rows, load_splits
from mlx_empire.data.stream import Flat, Pieces

KILLED = """\
import os, signal, sys
from mlx_empire.data import stream
from mlx_empire.data.splits import load_splits
add, count = stream.Pieces.add, [0]
def dies(self, document):
    add(self, document)
    count[0] += 1
    if count[0] == 300:
        self._flats[0]._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
stream.Pieces.add = dies
load_splits(path=sys.argv[1], sequence_length=16)
"""


def documents_of(lengths: list[int], seed: int) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [
        Document(
            f"here:{n}",
            rng.integers(0, 900, size).astype(np.int32),
            rng.integers(0, 2, size).astype(np.uint8),
        )
        for n, size in enumerate(lengths)
    ]


def stored(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=30),
    st.integers(1, 12),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_files_are_those_of_the_table_in_memory(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    width: int,
    splittable: bool,
    packing: bool,
    held: bool,
) -> None:
    documents = documents_of(lengths, len(lengths))
    folder = tmp_path_factory.mktemp("streamed")
    pieces = Pieces(folder, "train", width, splittable=splittable)
    for document in documents:
        pieces.add(document)
    chosen = np.ones(len(documents), bool)
    if held:
        chosen[held_out_rows(len(documents), 0.3)] = False
    expected, counts = build_table(
        [one for one, mine in zip(documents, chosen, strict=True) if mine], width, splittable, packing
    )
    own = pieces.of_documents(chosen)
    found = pieces.table("train", own, packing=packing)
    pieces.close()
    assert own.counts == counts
    assert (found is None) == (expected is None)
    if found is None or expected is None:
        return
    for name, array in expected.arrays().items():
        np.save(folder / "expected.npy", array)
        if name in ("tokens", "counted"):
            assert (folder / f"train.{name}.npy").read_bytes() == (folder / "expected.npy").read_bytes()
        assert np.array_equal(found[0].arrays()[name], array)
    assert found[1] == int(expected.counted.sum())
    assert {file.name for file in folder.iterdir()} == {
        "expected.npy",
        "train.tokens.npy",
        "train.counted.npy",
    }


@pytest.mark.parametrize("tokens", [33, 34, 64, 100])
def test_the_end_of_a_lone_document_is_the_one_that_is_cut_off_in_memory(tokens: int) -> None:
    (whole,) = documents_of([tokens], 3)
    whole = Document(whole.where, whole.tokens, np.ones(tokens, np.uint8))
    halves = end_held_out(whole, 16, 0.3)
    assert halves is not None
    pieces = Pieces(None, "train", 16, splittable=True)
    pieces.add(whole)
    edge = splits._edge(tokens, 16, 0.3)
    for half, own in zip(halves, pieces.of_lone(edge), strict=True):
        expected, counts = build_table([half], 16, True, False)
        found = pieces.table("x", own, packing=False)
        assert found is not None
        assert expected is not None
        assert own.counts == counts == Counts(1, 0, 0)
        assert all(np.array_equal(a, found[0].arrays()[n]) for n, a in expected.arrays().items())


def test_one_batch_of_documents_is_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    """Documents that are alive while the next one comes: those of a batch, of 3,000."""
    alive: list[int] = []
    living: set[int] = set()

    class Watched(Document):
        def __init__(self, *given: object) -> None:
            super().__init__(*given)  # type: ignore[arg-type]
            living.add(id(self))

        def __del__(self) -> None:
            living.discard(id(self))

    add, flats = Pieces.add, []

    def noted(self: Pieces, document: Document) -> None:
        add(self, document)
        alive.append(len(living))
        flats.append([flat.length for flat in self._flats])

    monkeypatch.setattr("mlx_empire.data.encode.Document", Watched)
    monkeypatch.setattr(Pieces, "add", noted)
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"tokens": list(range(n, n + 9))}) + "\n" for n in range(3000)))
    loaded = load_splits(path=file, sequence_length=16)
    assert len(loaded.train) == len(alive) == 3000
    assert max(alive) <= 2 * 256
    assert flats[-1] == [27000, 27000], "they were on their way to the disk"
    assert isinstance(loaded.train.parts[0].table.tokens, np.memmap)


def test_a_kill_in_the_middle_leaves_what_the_next_start_removes_and_makes_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"tokens": list(range(n, n + 40))}) + "\n" for n in range(600)))
    caches = [tmp_path / name for name in ("killed", "whole")]
    environment = {**os.environ, "MLX_EMPIRE_CACHE": str(caches[0])}
    ended = subprocess.run([sys.executable, "-c", KILLED, str(file)], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    (left,) = (caches[0] / "tokens").glob(".building-*.d")
    assert (left / "train.tokens.all").stat().st_size > 4 * 300 * 16
    entries = []
    for cache in caches:
        monkeypatch.setenv("MLX_EMPIRE_CACHE", str(cache))
        assert "written to" in load_splits(path=file, sequence_length=16).report[-1]
        (entry,) = (cache / "tokens").iterdir()
        entries.append((entry.name, stored(entry)))
    assert entries[0] == entries[1]


def test_a_build_that_goes_on_is_not_taken_for_a_dead_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    from mlx_empire.data.cache import tokens_folder
    from mlx_empire.disk import building

    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"tokens": [1, 2, 3]}) + "\n")
    with building(tokens_folder() / "other") as place:
        (place / "half").write_text("")
        load_splits(path=file, sequence_length=4)
        assert (place / "half").exists()
    assert not place.exists()
    assert not list(tokens_folder().glob(".building-*"))


def test_a_full_disk_leaves_the_rows_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"tokens": [n, n + 1, n + 2]}) + "\n" for n in range(9)))
    append = Flat.append

    def full(self: Flat, values: np.ndarray) -> None:
        if self.place is not None and self.length > 9:
            raise OSError(28, "No space left on device")
        append(self, values)

    monkeypatch.setattr(Flat, "append", full)
    loaded = load_splits(path=file, sequence_length=4)
    assert "tokens not cached" in loaded.report[-1]
    assert "No space left" in loaded.report[-1]
    assert [loaded.train.row(n).inputs.tolist() for n in (0, 8)] == [[0, 1], [8, 9]]
    assert not list((own_cache / "tokens").iterdir())


def test_of_a_document_are_held_the_bytes_that_are_stated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "RUNS", 2**8)
    count, one = 20_000, documents_of([9], 1)[0]
    pieces = Pieces(tmp_path, "train", 64, splittable=True)
    fixed_permutation(1)  # imports
    tracemalloc.start()
    for _ in range(count):
        pieces.add(one)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    made = pieces.table("train", pieces.of_documents(np.ones(count, bool)), packing=True)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    pieces.close()
    assert made is not None
    assert held < 1.15 * (9 + 8) * count, "arrays grow ahead by an eighth"
    assert most / count <= 80
