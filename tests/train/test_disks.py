"""Disks and runs: real runs leave what is planned, and a run that could not keep what it must does not begin."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
from support.disks import places
from support.faults import Command, Lab, succeeded

from mlx_empire.cluster.hostfile import Node
from mlx_empire.disk import SLACK_BYTES
from mlx_empire.formats.hf_folder import stored_if_whole
from mlx_empire.model.target import planned_target
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.resolve import resolve
from mlx_empire.recipe.load import load_recipe
from mlx_empire.run.disks import ledgers_of, look_at_disks, places_of, planned_places, what_else
from mlx_empire.train import command as train

WITHIN = 0.03  # of what is predicted, and what is small beside weights
SHORT = ["run.steps=3", "run.save_every=1", "run.eval_every=null"]
PLAIN = ["model.dtype=float32", "optimizer.state_bits=32"]
RUNS = {
    "packed-states": [*SHORT, "run.keep_last=2"],
    "adapters": [*SHORT, "tuning.type=lora", "run.keep_last=1", "memory.zero_stage=0"],
    "no-copies": [*SHORT, *PLAIN, "run.keep_last=1", "run.buddy=false", "memory.shares=[3,1]"],
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.at(tmp_path_factory.mktemp("disks"))


@pytest.fixture(scope="module")
def runs(lab: Lab) -> Lab:
    """Every run of `RUNS` on two ranks, each with a checkpoint folder of its own."""
    for outcome in lab.train_many({name: Command(more) for name, more in RUNS.items()}).values():
        succeeded(outcome)
    return lab


def held(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("name", RUNS)
def test_what_is_planned_is_what_a_run_leaves(runs: Lab, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.folder)
    recipe = load_recipe(Path("recipe.yaml"), [f"run.dir={name}", *RUNS[name]])
    target = planned_target(recipe, stored_if_whole)
    node = Node("here", 2, None, 1 << 34, 1 << 34)
    plan = resolve(recipe, target.spec, [node, node], state_bytes_of(recipe.optimizer))
    where = places(("0", "1"), ("king", "soldier"))
    found = ledgers_of(recipe, target, plan, where, 3, what_else(recipe, target))

    def check(predicted: int, left: Path) -> None:
        measured = held(left)
        assert abs(predicted - measured) <= WITHIN * measured + SLACK_BYTES / 4, (predicted, measured)

    for rank, one in enumerate(found):
        steps = sorted(runs.checkpoints(name, rank).glob("step-*"))
        assert len(steps) == one.keeping.at_the_end == (recipe.run.keep_last or 0)
        check(one.checkpoint + one.copies, steps[-1])
        assert bool(one.copies) == (name != "no-copies")
    check(found[0].result, runs.folder / name / "final")
    tokens = held(runs.folder / "cache")
    assert tokens / 4 < found[0].tokens <= 4 * tokens


def test_two_ranks_of_one_machine_share_its_disk(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one folder, or with one each; a machine that nobody asks has a disk of its own."""
    monkeypatch.chdir(lab.folder)
    host = socket.gethostname()
    recipe = load_recipe(Path("recipe.yaml"), ["run.dir=nowhere"])
    apart = load_recipe(Path("recipe.yaml"), ["run.dir=nowhere", "run.checkpoints=nowhere/{rank}"])
    for one, folders in ((recipe, 1), (apart, 2)):
        found = places_of([look_at_disks(one, rank, host, host) for rank in range(2)])
        assert (len(set(found.folders)), len(set(found.disks))) == (folders, 1)
        assert found.result == found.disks[0]
        assert abs(found.free[found.result] - shutil.disk_usage(lab.folder).free) < 1 << 30
    nodes = [
        Node(host, 1, None, 1, 1),
        Node("soldier", 1, None, 1, 1, disk_bytes=123),
        Node("other", 1, None, 1, 1),
    ]
    planned = planned_places(apart, nodes, host)
    assert len(set(planned.disks)) == 3
    assert planned.free[planned.disks[1]] == 123
    assert planned.disks[2] not in planned.free
    assert not Path("nowhere").exists()


def small(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Every disk has so many bytes free, as the system says."""
    real = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: real._replace(free=free))


def refused(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as left:
        train.main(arguments)
    return int(left.value.code or 0)


def test_a_run_that_could_not_keep_two_checkpoints_does_not_begin(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a disk with room for one of 1.8 MiB. Without checkpoints it has what it needs."""
    monkeypatch.chdir(lab.folder)
    monkeypatch.setenv("MLX_EMPIRE_CACHE", str(lab.folder / "cache"))
    small(monkeypatch, 3 << 20)
    assert refused(["recipe.yaml", "run.dir=tight"]) == 3
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if line.startswith("mlx_empire: ")]
    assert f"the disk of {socket.gethostname()} needs 3.8" in line
    assert " MiB at least (2 x 1.8" in line
    assert "and has 3.00 MiB free" in line
    assert "tuning.type: lora" in line
    assert not Path("tight").exists() or not list(Path("tight").iterdir())
    assert train.main(["recipe.yaml", *SHORT, "run.dir=tight", "run.save_every=null"]) == 0


def test_a_run_that_goes_on_is_warned_of_a_small_disk_and_ends(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checkpoint is safe, and a save without room costs a warning; what it has saved itself counts as free."""
    monkeypatch.chdir(lab.folder)
    monkeypatch.setenv("MLX_EMPIRE_CACHE", str(lab.folder / "cache"))
    arguments = ["recipe.yaml", *SHORT, "run.keep_last=1", "run.dir=goes-on"]
    assert train.main(arguments) == 0
    (lab.folder / "goes-on" / "COMPLETE").unlink()
    capsys.readouterr()
    for free, words in ((1 << 20, "WARNING: the disk of"), (3 << 20, "")):
        small(monkeypatch, free)
        assert train.main(arguments) == 0
        said = capsys.readouterr().out
        assert "going on after step 3" in said
        assert ("WARNING: the disk of" in said) == bool(words)
        (lab.folder / "goes-on" / "COMPLETE").unlink()


def test_capacity_says_the_same_of_a_disk_and_ends_with_3(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(lab.folder)
    small(monkeypatch, 3 << 20)
    assert train.main(["recipe.yaml", "run.dir=dry", "--dry-run"]) == 3
    said = " ".join(capsys.readouterr().out.split())
    assert "needs 3.8" in said
    assert " MiB at least (2 x 1.8" in said
    assert "tuning.type=lora" in said
    assert "or run.checkpoints on another one" in said
    assert not Path("dry").exists()
