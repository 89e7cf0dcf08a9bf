"""Faults strike where they are told to, once if told so, and nowhere without the variable."""

import errno
import subprocess
import sys
import textwrap

import pytest

from mlx_empire import progress
from mlx_empire.comm.failure import FAULT_VARIABLE, arm_faults
from mlx_empire.errors import UserError
from mlx_empire.faults import InjectedError


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No fault and step 0 after each test."""
    yield
    monkeypatch.delenv(FAULT_VARIABLE, raising=False)
    arm_faults(0)
    progress.begin_step(0)


def arm(monkeypatch, text: str, rank: int = 0) -> None:
    monkeypatch.setenv(FAULT_VARIABLE, text)
    arm_faults(rank)


def test_a_fault_strikes_at_its_rank_step_and_phase_only(monkeypatch):
    arm(monkeypatch, "rank=1;step=2;phase=forward;action=raise", rank=0)
    progress.begin_step(2)
    progress.reach("forward")
    arm(monkeypatch, "rank=1;step=2;phase=forward;action=raise", rank=1)
    progress.begin_step(1)
    progress.reach("forward")
    progress.begin_step(2)
    progress.reach("backward")
    with pytest.raises(InjectedError, match="forward at step 2"):
        progress.reach("forward")


def test_a_full_disk_looks_like_one(monkeypatch):
    arm(monkeypatch, "phase=save-write;action=enospc")
    with pytest.raises(OSError, match="No space") as caught:
        progress.reach("save-write")
    assert caught.value.errno == errno.ENOSPC


def test_once_is_remembered_in_a_file(monkeypatch, tmp_path):
    arm(monkeypatch, f"phase=data;action=raise;once={tmp_path}/struck")
    with pytest.raises(InjectedError):
        progress.reach("data")
    progress.reach("data")


def test_a_fault_of_an_earlier_run_of_this_process_is_forgotten(monkeypatch):
    arm(monkeypatch, "phase=data;action=raise")
    arm(monkeypatch, "")
    progress.reach("data")


@pytest.mark.parametrize(
    ("action", "code"), [("kill", -9), ("exit0", 0), ("exit3", 3), ("segv", -11)], ids=lambda v: str(v)
)
def test_actions_that_end_the_process(action, code):
    script = textwrap.dedent(
        """
        from mlx_empire import progress
        from mlx_empire.comm.failure import arm_faults
        arm_faults(0)
        progress.reach("optimizer")
        raise SystemExit(99)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"MLX_EMPIRE_FAULT": f"phase=optimizer;action={action}"},
        capture_output=True,
    )
    assert done.returncode == code, done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "kill",
        "phase=forward",
        "phase=nowhere;action=kill",
        "phase=data;action=x",
        "phase=data;action=nan",
        "phase=data;action=kill;a=b",
    ],
)
def test_what_cannot_be_read_is_said(monkeypatch, text):
    monkeypatch.setenv(FAULT_VARIABLE, text)
    with pytest.raises(UserError, match="MLX_EMPIRE_FAULT"):
        arm_faults(0)
