"""Clocks of a test's own making, by which a run on two ranks saves and evaluates."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from mlx_empire.train import loop as train

# Minutes at which the loop begins, then at which each step ends. Rank 0's clock is set back once, rank 1's is another.
CLOCKS = ([100, 110, 120, 131, 140, 125, 150, 156, 190], [0, 29, 31, 32, 33, 65, 66, 67, 300])


@contextmanager
def made_up_clock() -> Iterator[None]:
    """This rank's clock as `mlx_empire.train` reads it is the made-up one."""
    minutes = iter(CLOCKS[int(os.environ["OMPI_COMM_WORLD_RANK"])])
    clock = SimpleNamespace(time=lambda: 60.0 * next(minutes), perf_counter=time.perf_counter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "time", clock)
        yield


def by_hand(period: int) -> list[int]:
    """After which of the steps but the last one `period` minutes have passed on rank 0's clock."""
    begin, *ends = CLOCKS[0]
    last, found = begin, []
    for step, now in enumerate(ends[:-1], 1):
        last = min(last, now)  # it was set back
        if now - last >= period:
            found.append(step)
            last = now
    return found
