"""Runs `python -m mlx_empire.launch` on the tiny model, as a user does, and reads what it said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.mpi import ROOT, rank_environment
from train.launching import RECIPE

from mlx_empire.launch.process import descendants

SAID = "mlx_empire.launch: "
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
ROWS = ROOT / "build" / f"faults-launch{WORKER}.json"  # what became of which fault, for the table of faults
TIMEOUT_SECONDS = 90.0


@dataclass(frozen=True)
class Ended:
    """A launch that is over."""

    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def reports(self) -> list[str]:
        """The failure reports."""
        return [text for text in self.stderr.split(SAID) if text.startswith("the run failed")]


@dataclass
class Launching:
    """A folder in which launches run; `prefix` goes before each command, such as one that enters a machine."""

    folder: Path
    hosts: str = "localhost slots=2\n"
    prefix: Sequence[str] = ()

    def __post_init__(self) -> None:
        (self.folder / "recipe.yaml").write_text(RECIPE)
        (self.folder / "hosts.txt").write_text(self.hosts)

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / "run"

    def start(self, *words: object, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """The command `mlx_empire.launch WORDS`, running."""
        return subprocess.Popen(
            [*self.prefix, sys.executable, "-m", "mlx_empire.launch", *map(str, words)],
            cwd=self.folder,
            env=rank_environment(str(self.folder), env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )

    def launch(self, *words: object, env: Mapping[str, str] | None = None) -> Ended:
        """A launch of the recipe from start to end."""
        return finish(self.start("hosts.txt", "recipe.yaml", "--pause", "0.1", *words, env=env))

    def state(self) -> dict[str, Any]:
        """`launch.json`."""
        return json.loads((self.run / "launch.json").read_text())

    def ranks(self, launcher: int) -> list[int]:
        """The processes of the ranks of a running launch."""
        return [pid for pid in descendants(launcher) if b"mlx_empire.train" in _command_line(pid)]

    def living(self, pids: Sequence[int]) -> list[int]:
        """Those that still train."""
        return [pid for pid in pids if b"mlx_empire.train" in _command_line(pid)]

    def steps(self) -> int:
        """How many lines of metrics there are."""
        path = self.run / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def finish(process: subprocess.Popen[str]) -> Ended:
    """Wait for it; AssertionError where it hangs."""
    started = time.monotonic()
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        for number in (signal.SIGINT, signal.SIGINT):
            process.send_signal(number)
            time.sleep(1)
        stdout, stderr = process.communicate(timeout=30)
        raise AssertionError(f"it hangs\n{stdout[-3000:]}\n{stderr[-3000:]}") from None
    return Ended(process.returncode, stdout, stderr, time.monotonic() - started)


def wait_for(what: Callable[[], bool], seconds: float = TIMEOUT_SECONDS) -> None:
    """Return when it is true; AssertionError when that takes too long."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.05)


def fault(phase: str, action: str, once: Path | None = None, rank: int = 1, step: int = 2) -> str:
    """The environment variable's value that injects a fault."""
    named = f"rank={rank};step={step};phase={phase};action={action}"
    return f"{named};once={once}" if once else named


def note_row(fault: str, injected: str, lost: str, detected: str, continued: str) -> None:
    """A row of the table of faults; the same fault once."""
    ROWS.parent.mkdir(exist_ok=True)
    rows = json.loads(ROWS.read_text()) if ROWS.exists() else []
    row = {"fault": fault, "injected": injected, "lost": lost, "detected": detected, "continued": continued}
    rows = [*(other for other in rows if other["fault"] != fault), row]
    ROWS.write_text(json.dumps(rows, indent=1) + "\n")


def note_failure(launching: Launching, fault: str, injected: str, struck: float) -> None:
    """The row of a run's last failure, which began at `struck`, by the launcher's own clock."""
    failure = launching.state()["failures"][-1]
    lost = failure["step"] - 1 - (failure["committed"] or 0)
    detected, continued = failure["time"] - struck, failure["again"] - failure["time"]
    note_row(
        fault, injected, "1 step" if lost == 1 else f"{lost} steps", f"{detected:.1f} s", f"{continued:.1f} s"
    )
