"""Whether the main thread waits for what it asks MLX to evaluate, or hands it over to the device and goes on.

Running ahead, the device finds the next layer's work as soon as it has done the last one's, and never waits for Python.
MLX itself holds the main thread back: it waits once about a hundred tasks are not done, or memory is at its limit.
What the host does with results is done by the communication thread, which waits for them (`comm.buffers.host_view`).
Such an array is that thread's alone: the main thread puts it into no graph before it has waited for the exchange.

Streams work in order. So the bits are the same, and what is handed over later is done later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx


class Evaluations:
    """How what a step asks for is evaluated; `waits` is set for each of its actions (`plan.schedule`)."""

    def __init__(self) -> None:
        self.waits = True
        self._outstanding = False

    def __call__(self, *arrays: Any) -> None:
        """Evaluate trees of arrays, as `mx.eval` or as `mx.async_eval` does."""
        if self.waits:
            mx.eval(*arrays)
        else:
            mx.async_eval(*arrays)  # type: ignore[no-untyped-call]
            self._outstanding = True

    def in_groups(self, arrays: Iterable[mx.array], size_of: Callable[[mx.array], int], most: int) -> None:
        """Evaluate arrays in their order: together as many as have sizes of no more than `most`, or one."""
        group: list[mx.array] = []
        size = 0
        for array in arrays:
            own = size_of(array)
            if group and size + own > most:
                self(group)
                group, size = [], 0
            group.append(array)
            size += own
        self(group)

    def mark(self) -> mx.array | None:
        """An array that is there once all is done that was handed over before; None where nothing was.

        For one other thread, which waits for it by `host_view`.
        """
        if not self._outstanding:
            return None
        mark = mx.zeros(1)
        mx.async_eval(mark)  # type: ignore[no-untyped-call]
        return mark

    def finish(self) -> None:
        """Wait for all that was handed over."""
        if self._outstanding:
            mx.eval(mx.zeros(1))
            self._outstanding = False
