"""A rank that stops or hangs is found by the deadline of its phase; one that is only slow is not (H1, H2)."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from reliability.faulty import Ended, train
from train.launching import Workspace, step_records

HOST = socket.gethostname()
# Rows of tokens need no tokenizer: importing transformers would take the five seconds on a busy machine.
DATA = ("data.path=rows.jsonl", "data.format=tokens")
SHORT = ("comm.deadline_seconds=5", "run.steps=6", *DATA)


def stop_at(place: str) -> str:
    """SIGSTOP there, after a second in which the others can see where the rank is."""
    return f"{place};action=delay;seconds=1 {place};action=stop"


def last_words(ended: Ended) -> str:
    """What was said at the end; on the way stragglers are named."""
    assert "Traceback" not in ended.stderr
    return ended.said[-1]


def stacks(ended: Ended) -> set[int]:
    """The ranks that printed the stacks of their threads."""
    return {rank for rank in range(3) if f"---- stacks of rank {rank} on {HOST}" in ended.stderr}


def test_a_stopped_rank_is_found(workspace: Workspace) -> None:
    ended = train(workspace, stop_at("rank=1;step=3;phase=forward"), *SHORT, "run.dir=stopped")
    assert ended.code == 75
    assert re.match(rf"rank 1 on {HOST}: no sign of life for 5[. ]", last_words(ended))
    assert "last seen in forward of step 3 (deadline 5 s)" in last_words(ended)
    assert any(
        line.startswith(f"rank 1 on {HOST} is late: silent, last seen in forward") for line in ended.said
    )
    assert stacks(ended) >= {0}  # mpirun wakes the other to end it; it may come to print its own
    assert "Current thread" in ended.stderr
    assert [record["step"] for record in step_records(workspace.folder / "stopped")] == [1, 2]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("phase", "place"), [("reduce", "backward"), ("evaluate", "evaluate"), ("load", "load"), ("plan", "plan")]
)
def test_a_stopped_rank_is_found_in_every_phase(workspace: Workspace, phase: str, place: str) -> None:
    step = "" if phase in ("load", "plan") else "step=3;"
    ended = train(
        workspace,
        stop_at(f"rank=0;{step}phase={phase}"),
        *SHORT,
        f"run.dir=stopped-{phase}",
        "run.eval_every=3",
        "data.validation_split=0.25",
        ranks=3,
    )
    assert ended.code == 75
    assert re.search(rf"rank 0 on {HOST}: no sign of life for 5[. ]", last_words(ended))
    assert f"last seen in {place}" in last_words(ended)
    assert stacks(ended) >= {1, 2}


@pytest.mark.faults
def test_a_rank_without_micro_batches_is_found_where_it_is(workspace: Workspace) -> None:
    """The one micro-batch of a step is rank 0's; rank 1, which would leave in `forward` and `backward`, only joins."""
    elsewhere = " ".join(f"rank=1;phase={phase};action=exit3" for phase in ("forward", "backward"))
    fault = f"{elsewhere} {stop_at('rank=1;step=3;phase=collectives')}"
    ended = train(workspace, fault, *SHORT, "run.dir=joins", "batch.global_size=1", "batch.cells=1")
    assert ended.code == 75
    assert re.match(rf"rank 1 on {HOST}: no sign of life for 5[. ]", last_words(ended))
    assert "last seen in collectives of step 3 (deadline 5 s)" in last_words(ended)


@pytest.mark.faults
@pytest.mark.parametrize("ranks", [0, 2])
def test_a_rank_that_hangs_while_it_lives_is_found(workspace: Workspace, ranks: int) -> None:
    """All ranks print their stacks, that one too: it shows where it hangs."""
    fault = f"rank={max(ranks - 1, 0)};step=2;phase=optimizer;action=delay;seconds=600"
    ended = train(workspace, fault, *SHORT, f"run.dir=hangs-{ranks}", ranks=ranks)
    assert ended.code == 75
    stuck = rf"rank {max(ranks - 1, 0)} on {HOST}: stuck in optimizer of step 2: no progress for 5[. ]"
    assert re.search(stuck, last_words(ended))
    assert stacks(ended) == set(range(max(ranks, 1)))
    assert "in _strike" in ended.stderr


@pytest.mark.faults
def test_a_rank_that_stops_while_it_saves_is_found(workspace: Workspace) -> None:
    settings = (*SHORT, "run.dir=stopped-save", "run.save_every=1")
    ended = train(workspace, stop_at("rank=1;step=3;phase=save-write"), *settings)
    assert ended.code == 75
    assert re.search(rf"rank 1 on {HOST}: no sign of life for 5[. ]", last_words(ended))
    saved = workspace.folder / "stopped-save" / "checkpoints"
    # In step 3 the weights after step 2 are written.
    assert [folder.name for folder in sorted(saved.glob("step-*"))] == ["step-000001"]


@pytest.mark.faults
def test_a_slow_save_is_not_lost(workspace: Workspace) -> None:
    """A save that takes longer than a step may."""
    settings = (
        "comm.deadline_floor_seconds=3",
        "comm.deadline_seconds=40",
        "run.steps=12",
        "run.save_every=6",
    )
    slow = "rank=1;step=6;phase=save-write;action=delay;seconds=8"
    ended = train(workspace, slow, *settings, "run.dir=slow-save")
    assert ended.code == 0, ended.stderr[-3000:]
    assert (workspace.folder / "slow-save" / "COMPLETE").exists()
    assert not any("no sign of life" in line or "stuck" in line for line in ended.said)


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_pause_is_not_lost(workspace: Workspace) -> None:
    """A process that is stopped, and continued before its deadline; it was the others that were silent to it."""
    waker = threading.Thread(target=continue_after, args=("run.dir=pause", 5.0))
    waker.start()
    settings = ("comm.deadline_seconds=9", "run.steps=6", "run.dir=pause")
    ended = train(workspace, stop_at("rank=1;step=3;phase=forward"), *settings)
    waker.join()
    assert ended.code == 0, ended.stderr[-3000:]
    assert any(
        line.startswith(f"rank 1 on {HOST} is late: silent, last seen in forward") for line in ended.said
    )
    assert any(line.startswith(f"rank 1 on {HOST} did not run for ") for line in ended.said)


def continue_after(word: str, seconds: float) -> None:
    """Wait until a process with `word` among its arguments is stopped; continue it after so many seconds."""
    give_up = time.monotonic() + 120
    while time.monotonic() < give_up:
        for entry in Path("/proc").iterdir():
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if word.encode() in arguments and state == "T":
                time.sleep(seconds)
                os.kill(int(entry.name), signal.SIGCONT)
                return
        time.sleep(0.1)


@pytest.mark.faults
def test_the_deadline_is_learned(workspace: Workspace) -> None:
    """With a ceiling of an hour a stop after the first steps is found within seconds."""
    settings = (
        "comm.deadline_floor_seconds=4",
        "comm.deadline_seconds=3600",
        "run.steps=20",
        "run.dir=learned",
    )
    ended = train(workspace, stop_at("rank=1;step=12;phase=backward"), *settings)
    assert ended.code == 75
    found = re.search(r"last seen in backward of step 12 \(deadline ([0-9.]+) s\)", last_words(ended))
    assert found
    assert 4 <= float(found[1]) < 60


@pytest.mark.faults
def test_slow_is_not_lost(workspace: Workspace) -> None:
    """A slow rank, a slow evaluation and a slow start, each longer than what a peer's silence was allowed to be: they
    show life. The straggler is named, and the run completes."""
    slow = " ".join(
        [
            "rank=1;step=2;phase=forward;action=delay;seconds=5",
            "rank=0;step=4;phase=optimizer;action=delay;seconds=5",
            "rank=1;step=6;phase=evaluate;action=delay;seconds=5",
            "rank=0;phase=load;action=delay;seconds=5",
        ]
    )
    settings = ("comm.deadline_seconds=8", "run.steps=6", "run.eval_every=3", "run.dir=slow")
    ended = train(workspace, slow, *settings)
    assert ended.code == 0
    assert (workspace.folder / "slow" / "COMPLETE").exists()
    waited = step_records(workspace.folder / "slow")[1]["wait_seconds"]
    assert waited[0] > 3 > waited[1], "the figures name the straggler too"
    late = [line for line in ended.said if "is late" in line]
    assert [line.partition("; the run")[0] for line in late] == [
        f"rank 0 on {HOST} is late: still in load",
        f"rank 1 on {HOST} is late: still in forward of step 2",
        f"rank 0 on {HOST} is late: still in optimizer of step 4",
        f"rank 1 on {HOST} is late: still in evaluate of step 6",
    ]
