"""Runs that outlive the terminal: started in a session of their own, their output in a file that only the owner reads,
and followed from any other terminal.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mlx_empire.disk import append_private
from mlx_empire.errors import LostRankError, UserError
from mlx_empire.run.launched import LOG, RunFolder, read_state, supervised
from mlx_empire.run.lock import LAUNCHER, in_use
from mlx_empire.run.stop import request_stop

START_SECONDS = 30.0
POLL_SECONDS = 0.2
_TAIL_BYTES = 16 << 10


def detach(folder: Path, arguments: Sequence[str]) -> int:
    """Start `python -m mlx_empire.launch ARGUMENTS` on its own and return its process id once it has the run's folder.

    UserError when another launcher has it; LostRankError when the new one ends before it has begun.
    """
    with RunFolder(folder) as own:
        own.make()
        own.take()
    try:
        opened = append_private(folder / LOG)
    except OSError as error:
        raise UserError(
            f"{folder / LOG}: {error.strerror}; remove it, it must be a file of this user"
        ) from None
    with opened as log:
        start = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "mlx_empire.launch", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        state = read_state(folder)
        if state is not None and state.pid == process.pid:
            return process.pid
        if process.poll() is not None:
            said = (folder / LOG).read_bytes()[start:].decode(errors="replace").strip()
            raise LostRankError(f"the launcher ended with exit code {process.returncode}:\n{said}")
        time.sleep(POLL_SECONDS / 4)
    raise LostRankError(
        f"the launcher, process {process.pid}, has not begun after {START_SECONDS:g} s; see {folder / LOG}"
    )


def attach(folder: Path) -> int:
    """Show a detached run's output until it ends, and return its exit code. Ctrl-C leaves it running.

    UserError where no run was detached, LostRankError where its launcher died.
    """
    log = folder / LOG
    if not log.exists():
        raise UserError(f"{folder}: no run was started here with --detach")
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - _TAIL_BYTES, 0))
        try:
            while True:
                running = supervised(folder)
                while chunk := file.read(1 << 16):
                    sys.stdout.buffer.write(chunk)
                    sys.stdout.buffer.flush()
                if not running:
                    break
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            print(f"\nmlx_empire.launch: left; it goes on: mlx-empire attach {folder}")
            return 0
    state = read_state(folder)
    if state is None or state.code is None:
        raise LostRankError(f"{folder}: its launcher is gone without a word; start it again")
    return state.code


def stop(folder: Path) -> None:
    """Ask the run in `folder` to save and stop; UserError where none is supervised."""
    if not supervised(folder):
        raise UserError(f"{folder}: no launcher is at work here; look at it with status")
    request_stop(folder)


def refuse_second(folder: Path) -> None:
    """UserError when a launcher is at work in the folder."""
    if supervised(folder):
        raise in_use(folder, LAUNCHER)
