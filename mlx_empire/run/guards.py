"""What stands guard over a run until it ends: the watchdog, collectives that give right answers, one run per folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mlx_empire.comm.checks import self_test
from mlx_empire.comm.failure import together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.comm.watchdog import Watchdog
from mlx_empire.recipe.schema import Recipe
from mlx_empire.run.lock import RunLock


class Safeguards:
    """What stands guard until the run ends; `notes` are for the user once there is a report."""

    def __init__(self, comm: Communicator, stack: ExitStack) -> None:
        self._comm, self._stack = comm, stack
        self.notes: list[str] = []

    def lock(self, folder: Path) -> None:
        """Hold the run's folder from here on. UserError naming the holder if another run does. Collective."""
        with together(self._comm):
            if self._comm.rank == 0:
                held = self._stack.enter_context(RunLock(folder))
                self.notes += [held.note] if held.note else []


@contextmanager
def standing(comm: Communicator, recipe: Recipe) -> Iterator[Safeguards]:
    """The safeguards of a run, from its first collective to its end. Collective."""
    with ExitStack() as stack:
        stack.enter_context(Watchdog(comm, recipe.comm.deadline_seconds, recipe.comm.deadline_floor_seconds))
        self_test(comm)
        yield Safeguards(comm, stack)
