"""Faults that tests inject into a run: a phase that is reached, in which this process dies, stops, fails or is slow.

Nothing happens, and this file is not even imported (`comm.failure.arm_faults`), unless the environment says, for
example, MLX_EMPIRE_FAULT="rank=1;step=5;phase=reduce;action=kill". Fields: phase and action are required; rank (any),
step (any), seconds (for delay, 1), once (a file that is made when the fault strikes; where it exists nothing happens
any more, so that a restarted run survives). Several faults are separated by blanks.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from mlx_empire.errors import UserError
from mlx_empire.progress import PHASES

ACTIONS = (
    "kill",
    "stop",
    "exit0",
    "exit3",
    "raise",
    "segv",
    "enospc",
    "delay",
    "gpu",
    "gpu-memory",
    "malloc",
)
# What MLX 0.32.4 raises on Metal.
OF_METAL = {
    "gpu": "[METAL] Command buffer execution failed: Caused GPU Timeout Error "
    "(00000002:kIOGPUCommandBufferCallbackErrorTimeout)",
    "gpu-memory": "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    "malloc": "[metal::malloc] Resource limit (499000) exceeded.",
}


@dataclass(frozen=True)
class Fault:
    """One fault to inject; None means any."""

    phase: str
    action: str
    rank: int | None = None
    step: int | None = None
    seconds: float = 1.0
    once: Path | None = None


class InjectedError(RuntimeError):
    """What the fault `raise` raises: to the program an error like any other."""


class Faults:
    """The faults of one rank; called with every phase that a thread begins, and its step."""

    def __init__(self, rank: int, text: str, source: str) -> None:
        """`text`: the value of the environment variable `source`. UserError names what cannot be read of it."""
        faults = [_parse(part, source) for part in text.split()]
        self._mine = [fault for fault in faults if fault.rank in (None, rank)]

    def __call__(self, phase: str, step: int) -> None:
        here = [fault for fault in self._mine if fault.phase == phase and fault.step in (None, step)]
        for fault in [fault for fault in here if not (fault.once and fault.once.exists())]:
            if fault.once:
                fault.once.touch()
            _strike(fault, step)


def _parse(text: str, source: str) -> Fault:
    pairs = [field.partition("=") for field in text.split(";")]
    fields = {key: value for key, _, value in pairs}
    try:
        fault = Fault(
            phase=fields.pop("phase"),
            action=fields.pop("action"),
            rank=int(fields.pop("rank")) if "rank" in fields else None,
            step=int(fields.pop("step")) if "step" in fields else None,
            seconds=float(fields.pop("seconds", "1")),
            once=Path(fields.pop("once")) if "once" in fields else None,
        )
    except (KeyError, ValueError) as error:
        raise UserError(f"{source}: {text}: {error}; see mlx_empire/faults.py") from None
    if fields or fault.phase not in PHASES or fault.action not in ACTIONS:
        raise UserError(f"{source}: {text}: phases are {', '.join(PHASES)}; actions are {', '.join(ACTIONS)}")
    return fault


def _strike(fault: Fault, step: int) -> None:
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
        case "gpu" | "gpu-memory" | "malloc":
            raise RuntimeError(OF_METAL[fault.action])
        case _:
            raise InjectedError(f"injected in {fault.phase} at step {step}")
