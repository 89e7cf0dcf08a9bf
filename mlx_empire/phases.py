"""Where this process is in its work, and the faults that tests inject there.

`reach("forward")` says that a thread begins a phase: the watchdog and the failure report read it, and a fault waiting
for that phase strikes. Faults are for tests: nothing happens unless the environment says, for example,
MLX_EMPIRE_FAULT="rank=1;step=5;phase=reduce;action=kill". Fields: phase and action are required; rank (any), step
(any), seconds (for delay, 1), once (a file that is made when the fault strikes; where it exists nothing happens any
more, so that a restarted run survives). Several faults are separated by blanks.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from mlx_empire import beacon
from mlx_empire.errors import UserError

FAULT_VARIABLE = "MLX_EMPIRE_FAULT"
PHASES = (
    "load",
    "data",
    "forward",
    "backward",
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
)
ACTIONS = ("kill", "stop", "exit0", "exit3", "raise", "segv", "nan", "enospc", "delay")


@dataclass(frozen=True)
class Fault:
    """One fault to inject; None means any."""

    phase: str
    action: str
    rank: int | None = None
    step: int | None = None
    seconds: float = 1.0
    once: Path | None = None


@dataclass
class Place:
    """Where a thread is: phase, step (0 before the first) and since when (time.monotonic)."""

    phase: str = "start"
    step: int = 0
    since: float = field(default_factory=time.monotonic)


class InjectedError(RuntimeError):
    """What the fault `raise` raises: to the program an error like any other."""


_rank = 0
_step = 0
_faults: tuple[Fault, ...] | None = None
_places: dict[str, Place] = {}  # by thread name


def begin(rank: int) -> None:
    """Tell who this process is, once it is known. UserError for faults that cannot be read."""
    global _rank, _faults
    _rank, _faults = rank, parse(os.environ.get(FAULT_VARIABLE, ""))


def begin_step(step: int) -> None:
    """All phases from here on belong to this optimizer step, counted from 1."""
    global _step
    _step = step


def reach(phase: str) -> None:
    """This thread begins `phase`; a fault that waits here strikes."""
    thread, place = threading.current_thread().name, Place(phase, _step)
    _places[thread] = place
    beacon.place(thread, place.phase, place.step)  # before a fault strikes
    for fault in _waiting(phase):
        if fault.action != "nan":
            _mark(fault)
            _strike(fault)


def progress() -> None:
    """This thread is where it was, and gets on: a long phase is no hang while it says so now and then."""
    place = _places.setdefault(threading.current_thread().name, Place(step=_step))
    place.since = time.monotonic()


def leave() -> None:
    """This thread has nothing to do until it reaches its next phase."""
    thread = threading.current_thread().name
    _places.pop(thread, None)
    beacon.place(thread, "", _step)


def poisoned(phase: str) -> bool:
    """Whether a test wants a NaN in what this phase computes."""
    for fault in _waiting(phase):
        if fault.action == "nan":
            _mark(fault)
            return True
    return False


def places() -> dict[str, Place]:
    """Where each thread is, by its name; the main thread is `MainThread`."""
    return dict(_places)


def parse(text: str) -> tuple[Fault, ...]:
    """The faults of the environment variable's value. UserError names what cannot be read."""
    return tuple(_parse_one(one) for one in text.split())


def _parse_one(text: str) -> Fault:
    pairs = [field.partition("=") for field in text.split(";")]
    found = {key: value for key, _, value in pairs}
    try:
        fault = Fault(
            phase=found.pop("phase"),
            action=found.pop("action"),
            rank=int(found.pop("rank")) if "rank" in found else None,
            step=int(found.pop("step")) if "step" in found else None,
            seconds=float(found.pop("seconds", "1")),
            once=Path(found.pop("once")) if "once" in found else None,
        )
    except (KeyError, ValueError) as error:
        raise UserError(f"{FAULT_VARIABLE}: {text}: {error}; see mlx_empire/phases.py") from None
    if found or fault.phase not in PHASES or fault.action not in ACTIONS:
        raise UserError(
            f"{FAULT_VARIABLE}: {text}: phases are {', '.join(PHASES)}; actions are {', '.join(ACTIONS)}"
        )
    return fault


def _waiting(phase: str) -> list[Fault]:
    return [
        fault
        for fault in _faults or ()
        if fault.phase == phase
        and fault.rank in (None, _rank)
        and fault.step in (None, _step)
        and not (fault.once and fault.once.exists())
    ]


def _mark(fault: Fault) -> None:
    if fault.once:
        fault.once.touch()


def _strike(fault: Fault) -> None:
    match fault.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "exit0":
            os._exit(0)
        case "exit3":
            os._exit(3)
        case "segv":
            ctypes.string_at(0)
        case "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "delay":
            time.sleep(fault.seconds)
        case _:
            raise InjectedError(f"injected in {fault.phase} at step {_step}")
