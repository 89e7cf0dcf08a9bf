"""Decides that a Mac stays awake while one of its processes trains.

Not run in CI: only macOS has `caffeinate`, and only there is there anything to do.
"""

from __future__ import annotations

import os
import subprocess
import sys

CAFFEINATE = "/usr/bin/caffeinate"


def keep_awake() -> None:
    """Keep this machine awake for as long as this process lives: no idle sleep, and on mains power no sleep at all."""
    command = caffeinate(os.getpid())
    if sys.platform == "darwin" and os.path.exists(CAFFEINATE):
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )


def caffeinate(pid: int) -> list[str]:
    """The command that holds the machine awake until process `pid` ends."""
    return [CAFFEINATE, "-is", "-w", str(pid)]
