"""H4: three machines of unequal memory, each in a network namespace of its own; mpirun really spans them, and a cable
is pulled for two seconds and for ever."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from launch.launching import Ended, Launching, finish, note_failure, note_row, wait_for
from support.namespaces import Machines, why_not
from train.launching import curve, raw_tensors

GIB = 1 << 30
MEMORY = {"king": 3 * GIB, "soldier1": 2 * GIB, "soldier2": 2 * GIB}
HOSTS = "".join(
    f"{name} slots=1 # memory={size // GIB}GiB limit={size // GIB}GiB\n" for name, size in MEMORY.items()
)
STEPS = "run.steps=12"

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "namespaces work here"),
]


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    with Machines(tmp_path, MEMORY) as made:
        yield made
        for name in MEMORY:  # a machine that was cut off still has Open MPI's daemon
            for pid in made.processes(name):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not any(made.processes(name) for name in MEMORY), 10)


@pytest.fixture
def launching(tmp_path: Path, machines: Machines) -> Launching:
    return Launching(tmp_path, HOSTS, machines.on("king", []))


def launched(launching: Launching, machines: Machines, cut_seconds: float | None, *words: str) -> Ended:
    """A run whose second machine loses its link after a few steps; None: for ever."""
    after = 4 if "run.save_every=2" in words else 2
    process = launching.start(
        "hosts.txt", "recipe.yaml", "--pause", "0.1", STEPS, *words, env=machines.environment()
    )
    wait_for(lambda: launching.steps() >= after or process.poll() is not None)
    machines.struck = time.time()
    machines.cut("soldier1")
    if cut_seconds is not None:
        time.sleep(cut_seconds)
        machines.join("soldier1")
    return finish(process)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, uninterrupted, in one process."""
    launching = Launching(tmp_path_factory.mktemp("alone"), "localhost slots=1\n")
    assert launching.launch(STEPS).code == 0
    return launching.run


def test_a_link_that_is_away_for_two_seconds_changes_nothing(
    launching: Launching, machines: Machines, alone: Path
) -> None:
    ended = launched(launching, machines, 2.0)
    assert ended.code == 0, ended.stderr
    assert ended.reports == []
    assert curve(launching.run) == curve(alone)
    assert raw_tensors(launching.run / "final") == raw_tensors(alone / "final")
    ranks = json.loads((launching.run / "plan.json").read_text())["ranks"]
    assert [rank["node"]["name"] for rank in ranks] == list(MEMORY)
    assert [rank["share"] for rank in ranks] == pytest.approx([3 / 7, 2 / 7, 2 / 7], rel=0.01)
    note_row("a link away for 2 s", "cable out and in again", "0 steps", "-", "trains on")
    assert all(machines.limited(name) for name in MEMORY) or not os.access(machines.cgroups, os.W_OK)


def test_a_machine_that_stays_away_is_found_and_the_others_go_on_from_its_copy(
    launching: Launching, machines: Machines, alone: Path
) -> None:
    """C5, the node itself: its shard is taken from the copy that the next machine keeps."""
    words = ["comm.deadline_seconds=8", "--grace", "5", "--restarts", "1"]
    saving = ["run.save_every=2", "run.checkpoints=disk/{host}"]  # each machine has a disk of its own
    ended = launched(launching, machines, None, *words, *saving)
    assert ended.code == 0, ended.stderr
    (report,) = ended.reports
    assert "soldier1" in report
    assert "soldier1 stays away: ssh: connect to host soldier1: No route to host" in ended.stderr
    assert "GOING ON WITHOUT soldier1: on king, soldier2" in ended.stderr
    (failure,) = launching.state()["failures"]
    assert failure["step"] >= 3
    assert failure["committed"] >= 2
    assert f"the checkpoint of step {failure['committed']}" in report
    assert f"going on after step {failure['committed']}, from disk/king/" in ended.stdout
    assert launching.state()["machines"] == ["king", "soldier2"]
    what = "a machine gone for good, deadline 8 s, grace 5 s"
    note_failure(launching, what, "cable out of one of three", machines.struck)
    assert curve(launching.run) == curve(alone)
    assert raw_tensors(launching.run / "final") == raw_tensors(alone / "final")


def test_a_machine_that_crashes_and_comes_back_is_used_again(
    launching: Launching, machines: Machines, alone: Path
) -> None:
    """All its processes end at once, as when a machine restarts; mpirun may well return 0 then."""
    saving = ["run.save_every=2", "run.checkpoints=disk/{host}"]
    process = launching.start(
        "hosts.txt", "recipe.yaml", "--pause", "0.1", STEPS, *saving, env=machines.environment()
    )
    wait_for(lambda: launching.steps() >= 4 or process.poll() is not None)
    machines.struck = time.time()
    for pid in machines.processes("soldier1"):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    ended = finish(process)
    assert ended.code == 0, ended.stderr
    (report,) = ended.reports
    assert "rank 1 on soldier1" in report
    assert "GOING ON WITHOUT" not in ended.stderr
    note_failure(launching, "a machine restarts", "SIGKILL to all its processes", machines.struck)
    assert "going on after step" in ended.stdout
    assert curve(launching.run) == curve(alone)
    assert raw_tensors(launching.run / "final") == raw_tensors(alone / "final")


def test_without_a_restart_it_ends_with_75(launching: Launching, machines: Machines) -> None:
    words = ["comm.deadline_seconds=5", "--grace", "3", "--restarts", "0"]
    ended = launched(launching, machines, None, *words)
    assert ended.code == 75
    assert "soldier1" in ended.reports[0]
    assert not (launching.run / "COMPLETE").exists()
