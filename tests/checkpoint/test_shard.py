"""A shard holds what is in memory, another library reads it, and any damage is found and named."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open
from support.stepping import Case, trainer_of

from mlx_empire.checkpoint.agree import Folders
from mlx_empire.checkpoint.copies import exchange_copies
from mlx_empire.checkpoint.manifest import Shard
from mlx_empire.checkpoint.shard import live_pieces, piece_offsets, problem_with, write_shard
from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine.store import ShardStore
from mlx_empire.model.spec import BLOCK
from mlx_empire.plan.shards import make_plan

FILE = "shard-00000-of-00001.safetensors"


@pytest.fixture(scope="module")
def store() -> ShardStore:
    """A tiny bfloat16 llama with 8-bit states, in chunks of several tensors and units."""
    with CommThread() as thread:
        return trainer_of(Case(dtype="bfloat16", state_bits=8), SoloCommunicator("here"), thread).store


@pytest.fixture
def written(store: ShardStore, tmp_path: Path) -> tuple[Path, Shard, list[tuple[int, int]]]:
    path = tmp_path / FILE
    passed: list[tuple[int, int]] = []
    shard = write_shard(path, live_pieces(store, 0), 0, "here", lambda u, n: passed.append((u, n)))
    return path, shard, passed


def test_every_array_is_there_with_the_bytes_it_has_in_memory(
    store: ShardStore, written: tuple[Path, Shard, list[tuple[int, int]]]
) -> None:
    path, shard, _ = written
    found = {}
    with safe_open(str(path), "np") as file:
        names = set(file.keys())
    arrays = mx.load(str(path))
    for unit in store.chunks:
        for chunk in (c for segment in unit for c in segment):
            for name, array in {"weights": chunk.weights, **chunk.state}.items():
                key = f"{chunk.spec.name}/{name}"
                found[key] = mx.array_equal(arrays[key], array).item() and arrays[key].dtype == array.dtype
    assert found.keys() == names
    assert all(found.values())
    assert {a.dtype for a in arrays.values()} >= {
        mx.bfloat16,
        mx.uint16,
        mx.float32,
        mx.int8,
        mx.uint8,
        mx.int16,
    }
    raw = path.read_bytes()
    assert len(raw) == shard.nbytes
    for piece, start in piece_offsets(shard):
        assert hashlib.sha256(raw[start : start + piece.nbytes]).hexdigest() == piece.digest


def test_units_are_passed_in_the_order_of_the_update(
    store: ShardStore, written: tuple[Path, Shard, list[tuple[int, int]]]
) -> None:
    path, shard, passed = written
    assert [unit for unit, _ in passed] == [unit.index for unit in store.plan.units]
    assert [n for _, n in passed] == sorted(n for _, n in passed)
    assert passed[-1][1] == shard.nbytes == path.stat().st_size
    assert path.stat().st_mode & 0o777 == 0o600


def test_nothing_is_copied(store: ShardStore) -> None:
    pieces = live_pieces(store, 0)
    first = store.chunks[0][0][0]
    view = next(p for p in pieces if p.tensor == first.spec.name and p.array == "weights").views[0]
    before = view[:2].copy()
    first.weights  # noqa: B018 - alive
    view[:2] = before ^ 255
    assert np.array(first.weights.view(mx.uint16), copy=False).reshape(-1)[0] == int(
        (before ^ 255).view(np.uint16)[0]
    )
    view[:2] = before


def test_ranks_save_every_row_once_at_every_stage() -> None:
    """At stages at which weights or states are whole, each rank still saves its own interval alone."""
    with CommThread() as thread:
        made = trainer_of(Case(), SoloCommunicator("here"), thread).store
    spec_units = made.plan.units
    for stage in (0, 3):
        rows: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for rank in range(3):
            plan = make_plan(_units(made), [0.5, 0.2, 0.3], stage)
            store = _recut(made, plan, rank)
            for piece in live_pieces(store, rank):
                spans = rows.setdefault((piece.tensor, piece.array), [])
                spans.append((piece.first_row, piece.first_row + piece.rows))
        for unit in spec_units:
            for segment in unit.segments:
                for placement in segment.placements:
                    spans = sorted(rows[placement.tensor.name, "weights"])
                    assert spans[0][0] == 0
                    assert all(a[1] == b[0] for a, b in pairwise(spans))
                    assert spans[-1][1] == placement.tensor.padded_size // BLOCK


def _units(store: ShardStore):  # type: ignore[no-untyped-def]
    from mlx_empire.model.spec import UnitSpec

    return [
        UnitSpec(u.name, tuple(p.tensor for s in u.segments for p in s.placements)) for u in store.plan.units
    ]


class _Cut:
    """A store's chunks as a rank of another plan would have them."""

    def __init__(self, plan, chunks) -> None:  # type: ignore[no-untyped-def]
        self.plan, self.chunks = plan, chunks


def _recut(store: ShardStore, plan, rank: int):  # type: ignore[no-untyped-def]
    from mlx_empire.engine.store import LiveChunk

    def cut(segment) -> list[LiveChunk]:  # type: ignore[no-untyped-def]
        spans = segment.chunks(*plan.state_interval(segment, rank))
        return [LiveChunk(c, mx.zeros((c.rows, BLOCK)), {"m": mx.zeros((c.rows, BLOCK))}) for c in spans]

    return _Cut(plan, [[cut(segment) for segment in unit.segments] for unit in plan.units])


DAMAGE = {
    "one bit of the header": (lambda raw, shard: _flipped(raw, 12), "header: digest"),
    "one bit of the length": (lambda raw, shard: _flipped(raw, 0), "header: digest"),
    "one bit of the last byte": (lambda raw, shard: _flipped(raw, len(raw) - 1), "tensor {last}: digest"),
    "one bit of the first tensor": (
        lambda raw, shard: _flipped(raw, shard.header_bytes),
        "tensor {first}: digest",
    ),
    "a byte too few": (lambda raw, shard: raw[:-1], "bytes, expected"),
    "a byte too many": (lambda raw, shard: raw + b"\0", "bytes, expected"),
    "empty": (lambda raw, shard: b"", "has 0 bytes"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(written: tuple[Path, Shard, list[tuple[int, int]]], case: str) -> None:
    path, shard, _ = written
    assert problem_with(path, shard) is None
    change, said = DAMAGE[case]
    path.write_bytes(change(path.read_bytes(), shard))
    problem = problem_with(path, shard)
    assert problem is not None
    assert problem.startswith(f"{path}: ")
    assert said.format(first=shard.pieces[0].name, last=shard.pieces[-1].name) in problem


def test_a_link_and_a_folder_are_no_shards(written: tuple[Path, Shard, list[tuple[int, int]]]) -> None:
    path, shard, _ = written
    link = path.with_name("link")
    link.symlink_to(path)
    assert problem_with(link, shard) is not None
    assert problem_with(path.parent, shard) is not None
    assert problem_with(path.with_name("absent"), shard) is not None


def _flipped(raw: bytes, at: int) -> bytes:
    changed = bytearray(raw)
    changed[at] ^= 1
    return bytes(changed)


def test_units_are_written_in_the_order_in_which_they_are_updated(store: ShardStore, tmp_path: Path) -> None:
    """With gradient release the last layer is updated first; a shard in that order is as good as any other."""
    order = [*reversed(range(1, len(store.plan.units))), 0]
    pieces = live_pieces(store, 0, order)
    assert list(dict.fromkeys(piece.unit for piece in pieces)) == order
    shard = write_shard(tmp_path / FILE, pieces, 0, "here", lambda u, n: None)
    assert problem_with(tmp_path / FILE, shard) is None
    (tmp_path / "straight").mkdir()
    straight = write_shard(tmp_path / "straight" / FILE, live_pieces(store, 0), 0, "here", lambda u, n: None)
    assert {p.name: p.digest for p in shard.pieces} == {p.name: p.digest for p in straight.pieces}


@pytest.mark.parametrize("flipped", [None, 0, -1])
def test_a_copy_is_read_back(
    written: tuple[Path, Shard, list[tuple[int, int]]], tmp_path: Path, flipped: int | None
) -> None:
    """Rank 1 keeps rank 0's shard: a bit that changes on the way or on the disk is an error of the save."""
    path, shard, _ = written
    other, own = (
        shard.model_copy(update={"file": f"shard-{r:05}-of-00002.safetensors", "rank": r}) for r in (0, 1)
    )
    path.rename(tmp_path / own.file)
    sent = np.fromfile(tmp_path / own.file, np.uint8)
    raw = sent.tobytes()
    if flipped is not None:
        sent[flipped] ^= 1
    rest = [sent]

    def transfer(sends: list[tuple[int, np.ndarray]], receives: list[tuple[int, np.ndarray]]) -> None:
        assert [peer for peer, _ in (*sends, *receives)] == [0, 0]
        buffer = receives[0][1]
        buffer[:], rest[0] = rest[0][: buffer.size], rest[0][buffer.size :]

    comm = SimpleNamespace(rank=1, size=2, transfer=transfer)
    folders = Folders(tmp_path, 1, (0, 1), ("one", "two"))
    if flipped is None:
        exchange_copies(comm, folders, tmp_path, [other, own])
        assert (tmp_path / other.file).read_bytes() == raw
    else:
        with pytest.raises(OSError, match=f"{other.file}.*digest"):
            exchange_copies(comm, folders, tmp_path, [other, own])
