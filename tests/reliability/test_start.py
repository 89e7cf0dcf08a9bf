"""Before anything is allocated: ranks that differ are refused with what differs, and a folder has one run (O2, O3)."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from support.mpi import mpirun, rank_environment
from train.launching import RECIPE, Workspace, step_records, succeeded

from mlx_empire.run.lock import RunLock


def fake_package(folder: Path, name: str, version: str) -> None:
    """What pip leaves behind, for a package of another version."""
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_ranks_with_different_versions_are_refused(workspace: Workspace) -> None:
    fake_package(workspace.folder / "other", "mlx_lm", "0.1.0")
    program = f"{shlex.quote(sys.executable)} -m mlx_empire.train recipe.yaml run.dir=never"
    script = workspace.write(
        "start.sh",
        f'test "$OMPI_COMM_WORLD_RANK" = 1 && export PYTHONPATH="$PWD/other:$PYTHONPATH"\nexec {program}\n',
    )
    ended = workspace._run([mpirun(), "--oversubscribe", "-n", "2", "sh", str(script)], 0o022)
    assert ended.code == 64
    (said,) = ended.said
    assert said.startswith("ranks differ in mlx-lm; install the same versions")
    header, row = ended.stderr.partition(said)[2].strip("\n").splitlines()[:2]
    assert header.split() == f"rank 0 on {socket.gethostname()} rank 1 on {socket.gethostname()}".split()
    assert row.split()[0] == "mlx-lm"
    assert row.split()[2] == "0.1.0"
    assert "Traceback" not in ended.stderr
    assert not (workspace.folder / "never").exists()


def test_ranks_with_different_recipes_are_refused(workspace: Workspace) -> None:
    changed = RECIPE.replace("steps: 3", "steps: 4, seed: 7")
    folders = [workspace.write(f"{n}/recipe.yaml", text).parent for n, text in enumerate([RECIPE, changed])]
    ended = workspace.train("recipe.yaml", folders=folders)
    assert ended.code == 64
    assert ended.said[0].startswith("ranks differ in run.steps, run.seed; copy recipe.yaml to every machine")
    rows = [line.split() for line in ended.stderr.splitlines() if line.startswith("  run.")]
    assert rows == [["run.steps", "3", "4"], ["run.seed", "0", "7"]]
    assert not any((folder / "run").exists() for folder in folders)


def test_a_second_launch_is_refused_and_a_stale_lock_taken_over(workspace: Workspace) -> None:
    """The first run is stopped in the middle, so that it holds its folder; then it is killed."""
    command = [sys.executable, "-m", "mlx_empire.train", "recipe.yaml", "run.dir=one", "run.steps=500"]
    environment = rank_environment(str(workspace.folder))
    first = subprocess.Popen(
        command,
        cwd=workspace.folder,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    try:
        metrics = workspace.folder / "one" / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            assert first.poll() is None
            time.sleep(0.05)
        os.kill(first.pid, signal.SIGSTOP)
        lock = workspace.folder / "one" / "LOCK"
        assert lock.stat().st_mode & 0o777 == 0o600
        assert json.loads(lock.read_text())["pid"] == first.pid
        refused = workspace.train("recipe.yaml", "run.dir=one", ranks=2)
        assert refused.code == 64
        (said,) = refused.said
        assert f"run.dir: one: is in use by process {first.pid} on {socket.gethostname()}, since " in said
        assert "Traceback" not in refused.stderr
    finally:
        first.kill()
        first.wait()
    taken = succeeded(workspace.train("recipe.yaml", "run.dir=one", "run.resume=never"))
    told = " ".join(taken.stdout.split())
    assert f"took over the lock of one left by process {first.pid} on {socket.gethostname()}, since" in told
    assert step_records(workspace.folder / "one")[-1]["step"] == 3
    assert not lock.exists()


def test_a_run_that_cannot_begin_leaves_no_folder(workspace: Workspace) -> None:
    lock = RunLock(workspace.folder / "a" / "b")
    assert (workspace.folder / "a" / "b" / "LOCK").exists()
    assert (workspace.folder / "a" / "b").stat().st_mode & 0o777 == 0o700
    lock.release()
    assert not (workspace.folder / "a").exists()
