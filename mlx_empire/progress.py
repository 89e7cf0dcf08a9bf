"""Where this process is in its work: the phase of each of its threads, and what the launcher is told of it.

`reach("forward")` marks that a thread begins a phase. The watchdog and the failure report read the marks (`places`).

A launcher (`mlx_empire.launch`) hears of them as well, and of how the process ends. Machines share no disk, so that
goes the way that mpirun has laid already: a line on stderr with a mark in front, which the launcher reads and does
not show. Nothing is told unless the launcher set MLX_EMPIRE_BEACON=1. The lines hold ranks, host names, phases, steps
and our own messages, nothing from the environment.

The watchdog is also told which threads wait for other ranks, and when a message moved last. Waiting is not hanging: a
rank that waits is as healthy as the one it waits for.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

MARK = "@mlx_empire "
LAUNCHER_VARIABLE = "MLX_EMPIRE_BEACON"
PHASES = (
    "start",  # the ranks know each other, and read what they train on
    "proof",  # a scaled-down model is streamed and compared
    "plan",
    "load",
    "data",
    "forward",
    "backward",
    "collectives",  # in place of the two on a rank without micro-batches: it joins the others' gathers and reductions
    "reduce",  # before a reduce-scatter, on the communication thread
    "reduce-middle",  # when a part of it has moved
    "optimizer",
    "evaluate",
    "save-write",  # in the middle of a shard's file
    "save-fsync",  # a shard is written, not yet on the disk
    "save-copy",  # shards go to other nodes
    "save-rename",  # the manifest is on the disk, the folder has its temporary name
    "save-renamed",  # this node's folder is renamed, others may not be
    "save-commit",  # all are renamed, nothing is committed
    "retention",
    "save-wait",  # nothing is wrong: this thread waits for the checkpoint's
    "finish",
    "freeze",  # the result is frozen, and nothing says yet that the run is complete
    "prepare",  # a daughter's next generation has its rows, and is not in its place
    "decide",  # a generation is complete, and nothing is decided about it
    "promote",  # it is in use, and nothing says yet that this was decided
)

_STALL_SECONDS, _STALL_FACTOR = 600.0, 3.0


class Passing(str):
    """A line for the user that the next of its kind replaces, where progress is redrawn."""


def stalled_after(step: float) -> float:
    """Seconds without the end of a step after which a run is said to have stalled; `step`: how long one may take."""
    return max(_STALL_SECONDS, _STALL_FACTOR * step)


@dataclass
class Place:
    """Where a thread is: phase, step (0 before the first) and since when (time.monotonic)."""

    phase: str = "start"
    step: int = 0
    since: float = field(default_factory=time.monotonic)


Hook = Callable[[str, int], None]

_step = 0
_places: dict[str, Place] = {}  # by thread name
_told: dict[str, tuple[str, int]] = {}  # the last place of each thread that the launcher was told
_hook: Hook | None = None


def on_reach(hook: Hook | None) -> None:
    """From here on every `reach` ends with `hook(phase, step)`, in its thread; None: with nothing."""
    global _hook
    _hook = hook


def begin_step(step: int) -> None:
    """All phases from here on belong to this optimizer step, counted from 1."""
    global _step
    _step = step


def reach(phase: str) -> None:
    """This thread begins `phase`. Errors: those of the hook, if there is one."""
    thread, place = threading.current_thread().name, Place(phase, _step)
    _places[thread] = place
    _tell_place(thread, place.phase, place.step)
    if _hook is not None:
        _hook(place.phase, place.step)


def advance() -> None:
    """This thread is where it was, and gets on: a long phase is no hang while it says so now and then."""
    place = _places.setdefault(threading.current_thread().name, Place(step=_step))
    place.since = time.monotonic()


def leave() -> None:
    """This thread has nothing to do until it reaches its next phase."""
    thread = threading.current_thread().name
    _places.pop(thread, None)
    _tell_place(thread, "", _step)


def places() -> dict[str, Place]:
    """Where each thread is, by its name; the main thread is `MainThread`."""
    return dict(_places)


# ---- the launcher


def launched() -> bool:
    """Whether a launcher listens."""
    return os.environ.get(LAUNCHER_VARIABLE) == "1"


def tell(event: str, **fields: Any) -> None:
    """One line to the launcher; `fields` are JSON."""
    if not launched():
        return
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
    told = {"event": event, "rank": rank, "host": socket.gethostname(), "pid": os.getpid(), **fields}
    line = f"{MARK}{json.dumps(told)}\n"
    os.write(2, line.encode())  # one write, so that lines of other threads stay whole


def tell_failure(code: int, message: str, rank: int | None = None, host: str | None = None) -> None:
    """The run ends with exit code `code`; `message` is what the user reads. `rank` and `host`: where it failed, if
    not here."""
    elsewhere = {} if rank is None else {"rank": rank, "host": host, "pid": None}
    tell("failure", code=code, message=message, **elsewhere)


def tell_notice(kind: str, message: str) -> None:
    """What the recipe's owner may want to hear wherever they are; `kind` as in `recipe.notices`."""
    tell("notice", kind=kind, message=message)


def _tell_place(thread: str, phase: str, step: int) -> None:
    """Tell that a thread begins `phase` in `step`, if it is not where it was."""
    if _told.get(thread) != (phase, step):
        _told[thread] = (phase, step)
        tell("place", thread=thread, phase=phase, step=step)


_waiting: dict[str, float] = {}  # thread name -> since when (time.monotonic)
_moved = 0.0
_watched = False


@contextmanager
def waiting() -> Iterator[None]:
    """Around everything in which this thread can only go on when another rank does something."""
    name = threading.current_thread().name
    _waiting[name] = time.monotonic()
    try:
        yield
    finally:
        _waiting.pop(name, None)
        moved()


def moved() -> None:
    """A message has come or gone."""
    global _moved
    _moved = time.monotonic()


def last_moved() -> float:
    """When that was (time.monotonic); 0 if never."""
    return _moved


def waits(thread: str) -> bool:
    """Whether a thread waits for other ranks."""
    return thread in _waiting


def watch(running: bool) -> None:
    """A watchdog decides from now on, or no more, when a silent peer counts as lost."""
    global _watched
    _watched = running


def watched() -> bool:
    """Whether a watchdog decides that."""
    return _watched
