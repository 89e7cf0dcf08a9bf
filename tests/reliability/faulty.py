"""Runs a command with a fault in its ranks (see mlx_empire/faults.py), and sees how and when it ended."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from support.mpi import mpirun
from train.launching import Outcome, Workspace

from mlx_empire.comm.failure import FAULT_VARIABLE


@dataclass(frozen=True)
class Ended:
    """An outcome and the seconds it took, start-up included."""

    outcome: Outcome
    seconds: float

    @property
    def code(self) -> int:
        return self.outcome.code

    @property
    def said(self) -> list[str]:
        return self.outcome.said

    @property
    def stderr(self) -> str:
        return self.outcome.stderr


def train(workspace: Workspace, fault: str, *settings: str, ranks: int = 2) -> Ended:
    """`mlx_empire.train recipe.yaml SETTINGS` with a fault; 0 ranks: without mpirun."""
    launcher = [mpirun(), "--oversubscribe", "-n", str(ranks)] if ranks else []
    program = [*launcher, sys.executable, "-m", "mlx_empire.train", "recipe.yaml", *settings]
    start = time.monotonic()
    outcome = workspace._run(["env", f"{FAULT_VARIABLE}={fault}", *program], 0o022)
    return Ended(outcome, time.monotonic() - start)
