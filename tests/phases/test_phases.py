"""Faults strike where they are told to, once if told so, and nowhere without the variable."""

import errno
import subprocess
import sys
import textwrap

import pytest

from mlx_empire import beacon, phases
from mlx_empire.errors import UserError


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No fault and step 0 after each test."""
    yield
    monkeypatch.delenv(phases.FAULT_VARIABLE, raising=False)
    phases.begin(0)
    phases.begin_step(0)


def arm(monkeypatch, text: str, rank: int = 0) -> None:
    monkeypatch.setenv(phases.FAULT_VARIABLE, text)
    phases.begin(rank)


def test_a_fault_strikes_at_its_rank_step_and_phase_only(monkeypatch):
    arm(monkeypatch, "rank=1;step=2;phase=forward;action=raise", rank=0)
    phases.begin_step(2)
    phases.reach("forward")
    arm(monkeypatch, "rank=1;step=2;phase=forward;action=raise", rank=1)
    phases.begin_step(1)
    phases.reach("forward")
    phases.begin_step(2)
    phases.reach("backward")
    with pytest.raises(phases.InjectedError, match="forward at step 2"):
        phases.reach("forward")


def test_a_full_disk_looks_like_one(monkeypatch):
    arm(monkeypatch, "phase=save-write;action=enospc")
    with pytest.raises(OSError, match="No space") as caught:
        phases.reach("save-write")
    assert caught.value.errno == errno.ENOSPC


def test_once_is_remembered_in_a_file(monkeypatch, tmp_path):
    arm(monkeypatch, f"phase=data;action=raise;once={tmp_path}/struck")
    with pytest.raises(phases.InjectedError):
        phases.reach("data")
    phases.reach("data")


def test_nan_is_for_those_who_ask(monkeypatch):
    arm(monkeypatch, "phase=forward;action=nan")
    phases.reach("forward")
    assert phases.poisoned("forward")
    assert not phases.poisoned("backward")


@pytest.mark.parametrize(
    ("action", "code"), [("kill", -9), ("exit0", 0), ("exit3", 3), ("segv", -11)], ids=lambda v: str(v)
)
def test_actions_that_end_the_process(action, code):
    script = textwrap.dedent(
        """
        from mlx_empire import beacon, phases
        phases.begin(0)
        phases.reach("optimizer")
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
        "phase=data;action=kill;a=b",
    ],
)
def test_what_cannot_be_read_is_said(monkeypatch, text):
    monkeypatch.setenv(phases.FAULT_VARIABLE, text)
    with pytest.raises(UserError, match="MLX_EMPIRE_FAULT"):
        phases.begin(0)


def test_places_are_known_by_thread():
    phases.begin_step(7)
    phases.reach("backward")
    place = phases.places()["MainThread"]
    assert (place.phase, place.step) == ("backward", 7)


def test_the_launcher_hears_of_a_phase_before_the_fault_strikes(monkeypatch):
    arm(monkeypatch, "phase=forward;step=3;action=raise")
    heard = []
    monkeypatch.setattr(beacon, "place", lambda *place: heard.append(place))
    phases.begin_step(3)
    with pytest.raises(phases.InjectedError):
        phases.reach("forward")
    assert heard == [("MainThread", "forward", 3)]
