"""The saving thread: updates wait for it, disks may refuse, errors are raised where somebody sees them."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from support.stepping import Case, batches_of, counted_tokens, trainer_of

from mlx_empire import disk, progress
from mlx_empire.checkpoint import commit, save, shard
from mlx_empire.checkpoint.manifest import Identity, Origin, Resolved, decode_manifest, digest_of
from mlx_empire.checkpoint.save import Policy, Saver
from mlx_empire.checkpoint.shard import LivePiece, problem_with
from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine.trainer import Trainer

CASE = Case(dtype="bfloat16", state_bits=8, stage=2, learning_rate=1e-2)


@pytest.fixture
def trainer() -> Iterator[Trainer]:
    with CommThread() as thread:
        yield trainer_of(CASE, SoloCommunicator("here"), thread)


@pytest.fixture
def saver(trainer: Trainer, tmp_path: Path) -> Iterator[Saver]:
    resolved = Resolved(cells=1, gradient_dtype="float32")
    identity = Identity(Origin("", "data", None), 4, 0, resolved, trainer.store.plan)
    with Saver(
        SoloCommunicator("here"), trainer.store, tmp_path / "checkpoints", identity, Policy(2, True)
    ) as made:
        yield made


def step(trainer: Trainer, number: int) -> None:
    batches = batches_of(CASE, number)
    trainer.train_step(batches, counted_tokens(batches), number, 1e-2)


def weights(trainer: Trainer) -> dict[str, bytes]:
    return {
        c.spec.name + str(c.spec.first_row): bytes(mx.array(c.weights).view(mx.uint8))
        for unit in trainer.store.chunks
        for segment in unit
        for c in segment
    }


def test_a_slow_save_holds_the_state_of_its_own_step(
    trainer: Trainer, saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each unit waits until its bytes are written: the file holds step 1 although step 2 ran meanwhile."""
    step(trainer, 1)
    held = {c.spec.name for u in trainer.store.chunks for s in u for c in s}
    before = {
        (c.spec.name, c.spec.first_row, name): mx.array(a)
        for u in trainer.store.chunks
        for s in u
        for c in s
        for name, a in {"weights": c.weights, **c.state}.items()
    }
    mx.eval(before)
    gates = {unit.index: threading.Event() for unit in trainer.store.plan.units}
    written = commit.write_shard

    def slow(path, pieces, rank, host, passed):  # type: ignore[no-untyped-def]
        def gated(unit: int, nbytes: int) -> None:
            assert gates[unit].wait(60)
            passed(unit, nbytes)

        return written(path, pieces, rank, host, gated)

    monkeypatch.setattr(commit, "write_shard", slow)
    saver.request(1, {})
    order: list[str] = []
    hold = saver.hold

    def noted(unit: int) -> None:
        order.append(f"asked {unit}")
        gates[unit].set()  # only now may the writer go on: the update has asked and must wait
        hold(unit)
        order.append(f"may {unit}")

    trainer.store.hold = noted
    step(trainer, 2)
    saver.finish()
    assert order == [f"{what} {u.index}" for u in trainer.store.plan.units for what in ("asked", "may")]
    saved = mx.load(str(tmp_path / "checkpoints" / "step-000001" / "shard-00000-of-00001.safetensors"))
    assert {name.split("/")[0] for name in saved} == held
    for (tensor, row, name), array in before.items():
        rows = saved[f"{tensor}/{name}"][row : row + array.shape[0]]
        assert mx.array_equal(rows, array).item(), f"{tensor}/{name}"


def test_a_checkpoint_is_whole_and_describes_itself(trainer: Trainer, saver: Saver, tmp_path: Path) -> None:
    step(trainer, 1)
    saver.request(1, {"losses": [0.1, 0.2]})
    saver.finish()
    folder = tmp_path / "checkpoints" / "step-000001"
    raw = (folder / "MANIFEST.json").read_bytes()
    manifest = decode_manifest(raw)
    assert json.loads((folder / "COMMIT").read_text()) == {"step": 1, "manifest": digest_of(raw)}
    assert (manifest.step, manifest.next_row, manifest.numerics) == (1, 4, {"losses": (0.1, 0.2)})
    assert manifest.shards[0].folder == str(tmp_path / "checkpoints")
    assert problem_with(folder / manifest.shards[0].file, manifest.shards[0]) is None
    assert (tmp_path / "checkpoints" / "LATEST").read_text() == "step-000001\n"
    copies, line = saver.news()
    assert copies == "run.buddy: there is one checkpoint folder only, so there are no copies"
    assert line.startswith("step-000001 saved: ")
    assert saver.news() == []


def test_the_same_step_is_saved_once_and_old_ones_go(trainer: Trainer, saver: Saver, tmp_path: Path) -> None:
    for number in (1, 2, 2, 3):
        saver.request(number, {})
    saver.finish()
    told = [line.split()[0] for line in saver.news()]
    assert told == ["run.buddy:", "step-000001", "step-000002", "step-000003"]
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["LATEST", "step-000002", "step-000003"]
    assert saver.unsaved() == []


def test_too_little_room_is_said_before_anything_is_written(
    trainer: Trainer, saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=1000))
    saver.request(1, {})
    saver.finish()
    _, line = saver.news()
    assert line.startswith("WARNING: step-000001 could not be saved, training goes on; there is none yet: ")
    assert " needed, 1 KiB free" in line
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert saver.unsaved() == ["WARNING: the checkpoints of step 1 could not be saved; there is none"]


def test_an_error_of_the_thread_ends_the_training(
    trainer: Trainer, saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anything but a disk's refusal is a mistake of ours: the next update raises it instead of waiting for ever."""

    def broken(*_: object) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(commit, "write_shard", broken)
    saver.request(1, {})
    with pytest.raises(RuntimeError, match="a mistake"):
        step(trainer, 1)


def test_the_thread_rests_between_saves(saver: Saver) -> None:
    saver.request(1, {})
    saver.finish()
    assert "checkpoint" not in progress.places()
    assert saver.status is None


def test_views_are_dropped_as_units_are_written(trainer: Trainer, tmp_path: Path) -> None:
    """No copy of a shard is kept alive: once a unit is written nothing holds its old arrays."""
    pieces: list[LivePiece] = save.live_pieces(trainer.store, 0)
    seen: list[bool] = []

    def passed(unit: int, _: int) -> None:
        seen.append(all(not p.views for p in pieces if p.unit <= unit))

    commit.write_shard(tmp_path / "shard-00000-of-00001.safetensors", pieces, 0, "here", passed)
    assert seen == [True] * len(trainer.store.plan.units)


def test_everything_is_on_the_disk_before_what_makes_it_count(
    trainer: Trainer, saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shard, manifest and the draft's entries before the rename, that before COMMIT: a power cut leaves no half."""
    happened: list[int | str] = []
    rename = os.rename

    def renamed(source: Path, target: Path) -> None:
        happened.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "rename", renamed)
    for module in (disk, shard, commit):
        monkeypatch.setattr(module, "sync_file", lambda file: happened.append(os.fstat(file.fileno()).st_ino))
    for module in (disk, commit):
        monkeypatch.setattr(module, "sync_folder", lambda folder: happened.append(folder.stat().st_ino))
    saver.request(1, {})
    saver.finish()
    root = tmp_path / "checkpoints"
    names = {path.stat().st_ino: path.name for path in (root, *root.rglob("*"))}
    folder, file = "step-000001", "shard-00000-of-00001.safetensors"
    assert [names.get(one, one) if isinstance(one, int) else one for one in happened] == [
        *(file, "MANIFEST.json", folder, "rename", "checkpoints"),
        *("COMMIT", folder, "LATEST", "checkpoints"),
    ]
