"""O1, O2 and a run that outlives its terminal: started detached, looked at, stopped, gone on with, interrupted; and the
result is to the last bit that of a run that nobody touched."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from launch.launching import Launching, finish, note_row, wait_for
from support.mpi import mpirun, rank_environment
from train.launching import curve, raw_tensors

from mlx_empire.launch import command as launch

STEPS = ["run.steps=16", "run.save_every=6"]
SLOW = {"MLX_EMPIRE_FAULT": "phase=data;action=delay;seconds=0.3"}  # so that a request comes in time


@pytest.fixture
def launching(tmp_path: Path) -> Launching:
    return Launching(tmp_path)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, uninterrupted, in one process."""
    launching = Launching(tmp_path_factory.mktemp("alone"), "localhost slots=1\n")
    ended = launching.launch(*STEPS)
    assert ended.code == 0, ended.stderr
    return launching.run


def saved(launching: Launching) -> int:
    """The newest committed step."""
    return max(int(p.parent.name[5:]) for p in launching.run.glob("checkpoints/step-*/COMMIT"))


@pytest.mark.faults
def test_detached_stopped_resumed_interrupted_resumed(
    launching: Launching, alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(launching.folder)

    # ---- started without a terminal
    away = launching.launch("--detach", *STEPS, env=SLOW)
    assert away.code == 0, away.stderr
    pid = launching.state()["pid"]
    assert f"process {pid}" in away.stdout
    assert (launching.run / "launch.log").stat().st_mode & 0o777 == 0o600
    wait_for(lambda: launching.steps() >= 2)

    # ---- looked at from elsewhere; a second launch is refused with the holder's name
    assert launch.main(["status", "run"]) == 0
    status = capsys.readouterr().out
    assert f"process {pid}" in status
    assert "of 16" in status
    with pytest.raises(SystemExit) as refused:
        launch.main(["hosts.txt", "recipe.yaml", *STEPS])
    assert refused.value.code == 64
    assert f"in use by process {pid} on" in capsys.readouterr().err

    # ---- stopped by a file
    assert launch.main(["stop", "run"]) == 0
    assert launch.main(["attach", "run"]) == 143
    attached = capsys.readouterr().out
    assert "step  2/16" in attached
    assert "is saved" in attached
    first = launching.steps()
    assert saved(launching) == first < 16
    launch.main(["status", "run"])
    assert "exit code 143" in capsys.readouterr().out

    # ---- gone on with, and interrupted from the keyboard
    process = launching.start("hosts.txt", "recipe.yaml", *STEPS, env=SLOW)
    wait_for(lambda: launching.steps() > first or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    ended = finish(process)
    assert ended.code == 143, ended.stderr
    assert "saving and stopping" in ended.stderr
    assert ended.reports == []
    assert first < launching.steps() == saved(launching) < 16
    note_row("Ctrl-C", "SIGINT to launch", "0 steps", "after the step", "when asked to")

    # ---- to the end
    last = launching.launch(*STEPS)
    assert last.code == 0, last.stderr
    assert f"going on after step {saved_before(last.stdout)}" in last.stdout
    assert curve(launching.run) == curve(alone)
    assert raw_tensors(launching.run / "final") == raw_tensors(alone / "final")
    launch.main(["status", "run"])
    assert "complete" in capsys.readouterr().out


def saved_before(stdout: str) -> int:
    """The step after which a run says that it goes on."""
    return int(stdout.partition("going on after step ")[2].split(",")[0])


@pytest.mark.faults
@pytest.mark.parametrize(
    "phase",
    [
        "data",
        "forward",
        "backward",
        "reduce",
        "reduce-middle",
        "optimizer",
        "save-write",
        "save-rename",
        "save-commit",
    ],
)
def test_a_request_in_any_phase_saves(launching: Launching, alone: Path, phase: str) -> None:
    reached = launching.folder / "reached"
    step = "" if phase.startswith("save") else "step=3;"
    waits = f"rank=0;{step}phase={phase};action=delay;seconds=2;once={reached}"
    process = launching.start("hosts.txt", "recipe.yaml", *STEPS, env={"MLX_EMPIRE_FAULT": waits})
    wait_for(lambda: reached.exists() or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    ended = finish(process)
    assert ended.code == 143, ended.stderr
    assert launching.steps() == saved(launching) < 16
    assert launching.launch(*STEPS).code == 0
    assert curve(launching.run) == curve(alone)
    assert raw_tensors(launching.run / "final") == raw_tensors(alone / "final")


@pytest.mark.faults
def test_sigterm_saves_too(launching: Launching, alone: Path) -> None:
    process = launching.start("hosts.txt", "recipe.yaml", *STEPS, env=SLOW)
    wait_for(lambda: launching.steps() >= 1 or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    assert finish(process).code == 143
    assert launching.steps() == saved(launching)
    assert launching.launch(*STEPS).code == 0
    assert raw_tensors(launching.run / "final") == raw_tensors(alone / "final")


@pytest.mark.faults
def test_a_terminal_that_is_closed_saves_too(launching: Launching) -> None:
    """SIGHUP, and from then on nobody reads what is said."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_empire.launch", "hosts.txt", "recipe.yaml", *STEPS],
        cwd=launching.folder,
        env=rank_environment(str(launching.folder), SLOW),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(slave)
    reader = threading.Thread(target=drain, args=(master, stop := threading.Event()))
    reader.start()
    wait_for(lambda: launching.steps() >= 1 or process.poll() is not None)
    stop.set()
    reader.join()
    os.close(master)
    assert process.wait(60) == 143
    assert launching.steps() == saved(launching) < 16
    assert launching.state()["code"] == 143


def drain(descriptor: int, stop: threading.Event) -> None:
    """Read like a terminal's window, until it is closed."""
    while not stop.is_set():
        if select.select([descriptor], [], [], 0.1)[0]:
            os.read(descriptor, 1 << 16)


@pytest.mark.faults
def test_sigusr1_to_a_bare_mpirun_saves_too(launching: Launching, alone: Path) -> None:
    process = subprocess.Popen(
        [
            mpirun(),
            "--oversubscribe",
            "-n",
            "2",
            sys.executable,
            "-m",
            "mlx_empire.train",
            "recipe.yaml",
            *STEPS,
        ],
        cwd=launching.folder,
        env=rank_environment(str(launching.folder), SLOW),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: launching.steps() >= 1 or process.poll() is not None)
    process.send_signal(signal.SIGUSR1)
    assert finish(process).code == 143
    assert launching.steps() == saved(launching) < 16
    assert launching.launch(*STEPS).code == 0
    assert raw_tensors(launching.run / "final") == raw_tensors(alone / "final")


@pytest.mark.faults
def test_a_request_before_the_first_step_ends_it(launching: Launching) -> None:
    process = launching.start("hosts.txt", "recipe.yaml", *STEPS)
    wait_for(lambda: process.poll() is not None or bool(launching.ranks(process.pid)))
    process.send_signal(signal.SIGINT)
    assert finish(process).code == 143
    assert not (launching.run / "COMPLETE").exists()


@pytest.mark.faults
def test_ctrl_c_twice_does_not_wait(launching: Launching) -> None:
    slow = {"MLX_EMPIRE_FAULT": "phase=forward;step=2;action=delay;seconds=60"}
    process = launching.start("hosts.txt", "recipe.yaml", *STEPS, env=slow)
    wait_for(lambda: launching.steps() >= 1 or process.poll() is not None)
    ranks = launching.ranks(process.pid)
    assert len(ranks) >= 2
    process.send_signal(signal.SIGINT)
    time.sleep(1)  # two signals at once are one
    process.send_signal(signal.SIGINT)
    ended = finish(process)
    assert ended.code == 143
    assert ended.seconds < 30
    wait_for(lambda: not launching.living(ranks), 10)
