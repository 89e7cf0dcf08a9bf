"""An exception in one rank, in any phase: its traceback is shown once, with rank and host, and all ranks end (K2)."""

from __future__ import annotations

import socket

import pytest
from reliability.faulty import train
from train.launching import Workspace

HOST = socket.gethostname()
PHASES = ("load", "data", "forward", "backward", "reduce-middle", "optimizer", "evaluate", "finish")
SAVING = ("save-write", "save-fsync", "save-rename", "save-renamed", "save-commit", "retention")


def check(workspace: Workspace, phase: str, rank: int) -> None:
    step = "" if phase in ("load", "finish") else "step=2;"
    ended = train(
        workspace,
        f"rank={rank};{step}phase={phase};action=raise",
        f"run.dir=raises-{phase}",
        "run.eval_every=2",
        "run.save_every=1",
        "run.keep_last=1",
        "comm.deadline_seconds=60",
    )
    assert ended.code == 70, ended.stderr[-3000:]
    assert ended.stderr.count(f"InjectedError: injected in {phase} at step") == 1, ended.stderr[-3000:]
    assert [line for line in ended.said if "internal error" in line] == [
        f"rank {rank} on {HOST}: internal error"
    ]
    assert "no sign of life" not in ended.stderr, "it was not found by waiting"
    assert not (workspace.folder / f"raises-{phase}" / "COMPLETE").exists()


def test_an_exception_beside_the_main_thread(workspace: Workspace) -> None:
    """On the communication thread, while the other rank waits in the same exchange."""
    check(workspace, "reduce", 1)


@pytest.mark.faults
@pytest.mark.parametrize("phase", [*PHASES, *SAVING])
def test_an_exception_in_any_phase(workspace: Workspace, phase: str) -> None:
    check(workspace, phase, PHASES.index(phase) % 2 if phase in PHASES else 0)
