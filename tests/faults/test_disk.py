"""C6, C9: a disk that refuses costs a checkpoint, not the run; and nothing of anybody else's is ever removed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.faults import Command, Event, Lab, Outcome, Result, succeeded

SAVING = ("save-write", "save-fsync", "save-copy", "save-rename", "save-renamed", "save-commit")
# (phase, rank): that rank's disk is full the first time it comes there, which is the save of step 3.
ALWAYS = [("save-write", 1)]
OTHERS = [(phase, rank) for phase in SAVING for rank in (0, 1) if (phase, rank) not in ALWAYS]


AT_THE_END = ("finish", 0)  # rank 0's disk, which takes the result, is full when that is begun


def full(lab: Lab, cases: list[tuple[str, int]]) -> dict[tuple[str, int], Outcome]:
    commands = {}
    for phase, rank in cases:
        once = lab.folder / f"struck-{phase}-{rank}"
        fault = f"rank={rank};phase={phase};action=enospc;once={once}"
        alone = ["run.save_every=12", "run.buddy=false"] if phase == "finish" else []  # nothing to give up
        commands[f"full-{phase}-{rank}"] = Command(alone, fault)
    ended = lab.train_many(commands)
    return {(phase, rank): ended[f"full-{phase}-{rank}"] for phase, rank in cases}


@pytest.fixture(scope="module")
def always(lab: Lab) -> dict[tuple[str, int], Outcome]:
    return full(lab, [*ALWAYS, AT_THE_END])


@pytest.fixture(scope="module")
def others(lab: Lab) -> dict[tuple[str, int], Outcome]:
    return full(lab, OTHERS)


def check(lab: Lab, base: Result, outcome: Outcome, phase: str, rank: int) -> None:
    """Said at once and at the end; nothing is left of the save; later ones work; the result is the same."""
    name = f"full-{phase}-{rank}"
    succeeded(outcome)
    warning = next(line for line in outcome.stdout.splitlines() if line.startswith("WARNING: step-000003 "))
    assert "could not be saved, training goes on" in warning
    assert f"rank {rank} on " in warning
    assert "No space left on device" in warning
    at_the_end = "WARNING: the checkpoints of step 3 could not be saved; the newest is that of step 12"
    assert at_the_end in outcome.stdout
    assert lab.committed(name) == [6, 9, 12]
    for node in range(2):
        kept = {path.name for path in lab.checkpoints(name, node).iterdir()}
        assert kept == {"step-000006", "step-000009", "step-000012", "LATEST"}
    assert lab.result(name) == base
    where = "first" if rank == 0 else "last"
    lab.events.append(
        Event(f"disk full: {phase} on {where} rank", "ENOSPC raised", "a checkpoint", "at once", "trains on")
    )


@pytest.mark.parametrize(("phase", "rank"), ALWAYS)
def test_a_full_disk_costs_one_checkpoint(
    lab: Lab, base: Result, always: dict[tuple[str, int], Outcome], phase: str, rank: int
) -> None:
    check(lab, base, always[phase, rank], phase, rank)


def test_a_disk_that_is_full_at_the_end_is_waited_for(
    lab: Lab, base: Result, always: dict[tuple[str, int], Outcome]
) -> None:
    phase, rank = AT_THE_END
    outcome = succeeded(always[AT_THE_END])
    (line,) = [line for line in outcome.stdout.splitlines() if line.startswith("WAITING: ")]
    assert "No space left on device: the run waits with the weights in memory; free some room" in line
    assert "step-000012 is saved" in line
    name = f"full-{phase}-{rank}"
    assert lab.committed(name) == [12]
    assert lab.result(name) == base


@pytest.mark.faults
@pytest.mark.parametrize(("phase", "rank"), OTHERS)
def test_wherever_the_disk_is_full_only_that_checkpoint_is_lost(
    lab: Lab, base: Result, others: dict[tuple[str, int], Outcome], phase: str, rank: int
) -> None:
    check(lab, base, others[phase, rank], phase, rank)


@pytest.mark.faults
def test_a_disk_that_stays_full_leaves_the_checkpoint_before(lab: Lab, base: Result) -> None:
    name = lab.copy("base", "full-for-good", [3])
    ended = lab.train(name, fault="phase=save-write;action=enospc;rank=1")
    succeeded(ended)
    assert "of step 6, 9, 12 could not be saved; the newest is that of step 3" in ended.stdout
    assert lab.committed(name) == [3]
    assert lab.result(name) == base.after(3)


@pytest.fixture
def small_disk(lab: Lab) -> Iterator[Path]:
    """A real file system of 3 MiB, with room for one checkpoint and a half."""
    disk = lab.folder / "small" / "node-1"
    disk.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=False).returncode:
        pytest.skip("file systems may not be mounted here (that needs root on Linux)")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.faults
def test_a_disk_that_really_fills_up_and_is_then_read_only(lab: Lab, base: Result, small_disk: Path) -> None:
    """Copies go first, then old checkpoints; a disk that cannot be written is refused at the next start."""
    ended = succeeded(lab.train("small"))
    assert "step-000003 saved" in ended.stdout
    assert "gave up copies of step-000003 for room" in ended.stdout
    assert "no room for copies on " in ended.stdout
    assert "gave up step-000003 for room" in ended.stdout
    assert "could not be saved" not in ended.stdout
    assert lab.committed("small")[-1] == 12
    assert {p.name for p in small_disk.glob("step-*")} == {
        p.name for p in lab.checkpoints("small", 0).glob("step-*")
    }
    assert lab.result("small") == base
    (lab.folder / "small" / "COMPLETE").unlink()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    again = lab.train("small")
    assert again.code == 64
    assert "Read-only file system; choose a folder that can be written" in again.stderr
    subprocess.run(["mount", "-o", "remount,rw,size=30m", small_disk], check=True)
    assert succeeded(lab.train("small")).resumed == 12


@pytest.mark.faults
def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(lab: Lab) -> None:
    (lab.folder / "a-file").write_text("")
    ended = lab.train("refused", "run.checkpoints=a-file/{rank}")
    assert ended.code == 64
    assert "run.checkpoints: a-file/" in ended.stderr
    assert "step  1/12" not in ended.stdout


@pytest.mark.faults
def test_old_checkpoints_go_but_for_the_pinned_and_nothing_else_is_touched(lab: Lab, base: Result) -> None:
    """A pin on one node, folders of other people, links to outside, a foreign file in an old checkpoint."""
    name = lab.copy("base", "kept", [3])
    outside = lab.folder / "outside"
    outside.mkdir()
    (outside / "shard-00000-of-00002.safetensors").write_text("precious")
    (outside / "COMMIT").write_text("precious")
    nodes = [lab.checkpoints(name, rank) for rank in range(2)]
    (nodes[1] / "step-000003" / "KEEP").touch()
    for node in nodes:
        (node / "step-000001").symlink_to(outside)
        (node / ".tmp-2-0123abcd").symlink_to(outside)
        (node / ".tmp-6-0123abcd").mkdir()
        (node / ".tmp-6-0123abcd" / "shard-00000-of-00002.safetensors").touch()
        (node / "mine").mkdir()
        (node / "step-2").mkdir()
        (node / "step-000002.bak").mkdir()
    outcome = succeeded(lab.train(name, "run.keep_last=1", "run.save_every=1"))
    assert outcome.resumed == 3
    assert lab.result(name) == base.after(3)
    assert {p.name: p.read_text() for p in outside.iterdir()} == {
        "shard-00000-of-00002.safetensors": "precious",
        "COMMIT": "precious",
    }
    for node in nodes:
        kept = {path.name for path in node.iterdir()}
        theirs = {"step-000001", ".tmp-2-0123abcd", "mine", "step-2", "step-000002.bak"}
        assert kept == theirs | {"step-000003", "step-000012", "LATEST"}


@pytest.mark.faults
def test_a_disk_that_refuses_to_remove_is_only_a_warning(lab: Lab, base: Result) -> None:
    name = lab.copy("base", "stuck", [3])
    once = lab.folder / "struck-retention"
    ended = lab.train(name, "run.keep_last=1", fault=f"rank=1;phase=retention;action=enospc;once={once}")
    succeeded(ended)
    assert "WARNING: old checkpoints could not be removed: rank 1 on " in ended.stdout
    assert lab.committed(name) == [12]
    assert lab.result(name) == base.after(3)


@pytest.mark.faults
def test_folders_are_private_whatever_the_umask(lab: Lab) -> None:
    def modes(path: Path) -> set[int]:
        return {p.stat().st_mode & 0o777 for p in path.rglob("*") if p.is_file() != p.is_dir()}

    for rank in range(2):
        assert modes(lab.checkpoints("base", rank)) <= {0o600, 0o700}
