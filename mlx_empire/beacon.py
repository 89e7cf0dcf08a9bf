"""What a rank tells the launcher that started it: where it is, and how it ends.

Machines share no disk, so it goes the way that mpirun has laid already: a line on stderr with a mark in front, which
the launcher reads and does not show. Nothing is told unless `mlx_empire.launch` set MLX_EMPIRE_BEACON=1. The lines
hold ranks, host names, phases, steps and our own messages, nothing from the environment.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any

MARK = "@mlx_empire "
VARIABLE = "MLX_EMPIRE_BEACON"

_told: dict[str, tuple[str, int]] = {}  # the last place of each thread


def lit() -> bool:
    """Whether a launcher listens."""
    return os.environ.get(VARIABLE) == "1"


def tell(event: str, **fields: Any) -> None:
    """One line to the launcher; `fields` are JSON."""
    if not lit():
        return
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
    told = {"event": event, "rank": rank, "host": socket.gethostname(), "pid": os.getpid(), **fields}
    os.write(
        2, f"{MARK}{json.dumps(told)}\n".encode()
    )  # one write, so that lines of other threads stay whole


def place(thread: str, phase: str, step: int) -> None:
    """This thread begins `phase` in `step`; told when it is not where it was."""
    if _told.get(thread) != (phase, step):
        _told[thread] = (phase, step)
        tell("place", thread=thread, phase=phase, step=step)


def failure(code: int, message: str, rank: int | None = None, host: str | None = None) -> None:
    """The run ends with exit code `code`; `message` is what the user reads. `rank` and `host`: where it failed, if
    not here."""
    elsewhere = {} if rank is None else {"rank": rank, "host": host, "pid": None}
    tell("failure", code=code, message=message, **elsewhere)
