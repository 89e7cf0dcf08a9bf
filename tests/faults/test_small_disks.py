"""A run on a disk that is too small for what it was asked to keep loses nothing: old checkpoints go, and at the end it
waits for room. On real file systems, as small as 4 times the model: a checkpoint takes 3 times the model's size. One
that could not keep two checkpoints from its beginning is refused.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from support.faults import Lab, Result, succeeded

MODEL_BYTES = 4 * 279_232
STEPS = 30
DEADLINE = 25  # seconds: a machine that does other work too needs more than a few for the first step
SETTINGS = (
    "model.dtype=float32",
    "optimizer.state_bits=32",
    f"run.steps={STEPS}",
    "run.save_every=5",
    "run.eval_every=null",
)

pytestmark = pytest.mark.faults
Mount = Callable[[str, float], Path]


@pytest.fixture(scope="module")
def roomy(lab: Lab) -> Result:
    """The same run where there is room."""
    succeeded(lab.train("roomy", *SETTINGS, ranks=1))
    return lab.result("roomy")


@pytest.fixture
def disk(lab: Lab) -> Iterator[Mount]:
    """Gives run NAME a file system of its own, of so many times the model's size."""
    mounted: list[Path] = []

    def mount(name: str, times: float) -> Path:
        folder = lab.folder / name
        folder.mkdir()
        size = f"size={int(times * MODEL_BYTES)}"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=False).returncode:
            pytest.skip("file systems may not be mounted here (that needs root on Linux)")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def fill_once_begun(folder: Path, times: float) -> Path:
    """Another program's file, so many times the model's size, from the first step on: before, the run is refused."""
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.001)
    filler = folder / "filler"
    filler.write_bytes(bytes(int(times * MODEL_BYTES)))
    return filler


def until_it_waits(run: subprocess.Popen[str]) -> list[str]:
    """What it says until it waits for room."""
    assert run.stdout is not None
    said = []
    for line in run.stdout:
        said.append(line.rstrip())
        if line.startswith("WAITING: "):
            return said
    raise AssertionError("it never waited:\n" + "\n".join(said[-40:]))


def check_whole(lab: Lab, name: str, roomy: Result) -> None:
    """No step is lost, the weights are those of the run with room, and mlx-lm opens them."""
    found = lab.result(name)
    assert list(found.curve) == list(range(1, STEPS + 1))
    assert found.weights == roomy.weights
    weights = {}
    for folder in ("roomy", name):
        model, _ = mlx_lm.load(str(lab.folder / folder / "final"))
        weights[folder] = dict(tree_flatten(model.parameters()))
    assert all(mx.array_equal(w, weights["roomy"][n]).item() for n, w in weights[name].items())


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("times", [7, 12])
def test_old_checkpoints_make_room_for_new_ones_and_for_the_result(
    lab: Lab, roomy: Result, disk: Mount, times: int, ranks: int
) -> None:
    name = f"times-{times}-on-{ranks}"
    disk(name, times)
    ended = succeeded(lab.train(name, *SETTINGS, ranks=ranks))
    assert "could not be saved" not in ended.stdout
    assert "gave up step-000005 for room" in ended.stdout
    check_whole(lab, name, roomy)
    assert lab.committed(name, ranks)[-1] == STEPS
    for node in range(ranks):  # nothing is left in half
        steps = {path.name for path in lab.checkpoints(name, node).iterdir()} - {"LATEST"}
        assert steps == {f"step-{step:06d}" for step in lab.committed(name, ranks)}
    (lab.folder / name / "COMPLETE").unlink()
    assert succeeded(lab.train(name, *SETTINGS, ranks=ranks)).resumed == STEPS
    assert lab.result(name).weights == roomy.weights


def test_a_pinned_checkpoint_is_not_given_up(lab: Lab, roomy: Result, disk: Mount) -> None:
    """Pinned on one of two nodes, it stays on both."""
    succeeded(lab.train("roomy-2", *SETTINGS, "run.buddy=false"))
    folder = disk("pinned", 12)
    lab.copy("roomy-2", "pinned", [5])
    (folder / "node-1" / "step-000005" / "KEEP").touch()
    ended = succeeded(lab.train("pinned", *SETTINGS))
    assert ended.resumed == 5
    assert "gave up step-000010 for room" in ended.stdout
    assert "step-000005 for room" not in ended.stdout
    assert lab.committed("pinned")[0] == 5
    shard = "step-000005/shard-0000{0}-of-00002.safetensors"
    for node in range(2):
        own = shard.format(node)
        assert (folder / f"node-{node}" / own).read_bytes() == (
            lab.checkpoints("roomy-2", node) / own
        ).read_bytes()
    assert lab.result("pinned").weights == roomy.weights


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_newest_checkpoint_stays_and_the_result_waits_for_room(
    lab: Lab, roomy: Result, disk: Mount, ranks: int
) -> None:
    """Room for one checkpoint and no result, once it has begun: it waits longer than any deadline, and ends well when
    there is room.
    """
    name = f"waits-{ranks}"
    folder = disk(name, 7)
    deadlines = (f"comm.deadline_seconds={DEADLINE}", f"comm.deadline_floor_seconds={DEADLINE}")
    run = lab.begin(name, *SETTINGS, *deadlines, "run.buddy=false", ranks=ranks)
    fill_once_begun(folder, 3.1)
    said = until_it_waits(run)
    assert (
        sum("could not be saved, training goes on; the newest is step-000005" in line for line in said) == 5
    )
    assert f"{name}/final: needs " in said[-1]
    assert "step-000005 is saved" in said[-1]
    assert lab.committed(name, ranks) == [5]
    time.sleep(DEADLINE + 2)
    assert run.poll() is None
    size = f"remount,size={11 * MODEL_BYTES}"
    subprocess.run(["mount", "-o", size, folder], check=True)
    out, _ = run.communicate(timeout=120)
    assert run.returncode == 0, out
    assert "WARNING: the checkpoints of step 10, 15, 20, 25, 30 could not be saved" in out
    check_whole(lab, name, roomy)
    assert lab.committed(name, ranks) == [5]


def test_a_run_that_waits_saves_and_stops_when_it_is_asked_to(lab: Lab, roomy: Result, disk: Mount) -> None:
    """Another program's file fills the run's disk; checkpoints lie on another one, where the last step is saved."""
    folder = disk("stopped", 3)
    settings = (*SETTINGS[:3], "run.eval_every=null", f"run.checkpoints={lab.folder}/elsewhere/{{rank}}")
    run = lab.begin("stopped", *settings)
    filler = fill_once_begun(folder, 2.5)
    until_it_waits(run)
    (folder / "stop").touch()
    out, _ = run.communicate(timeout=120)
    assert run.returncode == 143, out
    assert f"step-{STEPS:06d} is saved; the same command goes on from there" in out
    assert not (folder / "final").exists()
    assert not list(folder.glob(".final*"))
    filler.unlink()
    assert succeeded(lab.train("stopped", *settings)).resumed == STEPS
    check_whole(lab, "stopped", roomy)


def test_a_disk_that_fills_up_while_the_result_is_written(lab: Lab, roomy: Result, disk: Mount) -> None:
    """Room for the records and a part of the result: nothing of the attempt is left, and it is made again."""
    folder = disk("torn", 1.3)
    settings = (*SETTINGS[:3], "run.eval_every=null", "run.save_every=null")
    run = lab.begin("torn", *settings, ranks=1)
    filler = folder / "filler"
    while run.poll() is None:  # from the moment at which the result is begun another program fills the disk
        if (folder / ".final.partial").exists():
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(1 << 16))
                except OSError:
                    break
        time.sleep(0.005)
    said = until_it_waits(run)
    assert "No space left on device" in said[-1] or " are free on its disk" in said[-1]
    assert not list(folder.glob(".final*"))
    filler.unlink()
    out, _ = run.communicate(timeout=120)
    assert run.returncode == 0, out
    check_whole(lab, "torn", roomy)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_is_too_small_from_the_beginning_is_refused(lab: Lab, disk: Mount, ranks: int) -> None:
    """Room for one checkpoint and the result, but not for the next one beside it."""
    name = f"refused-{ranks}"
    folder = disk(name, 5.5)
    ended = lab.train(name, *SETTINGS, ranks=ranks)
    assert ended.code == 3
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("mlx_empire: ")]
    assert "at least (2 x " in line
    assert "of result) and has 5." in line
    assert list(folder.iterdir()) == []
    assert lab.train(name, *SETTINGS, "--dry-run", ranks=ranks).code == 3
