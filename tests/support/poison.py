"""NaNs in what a rank computes: the product's own functions wrapped, in a process that runs it.

As a program: `python poison.py PLACE STEP MODULE ARGUMENT...` runs `python -m MODULE ARGUMENT...` with a NaN in it.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlx_empire import progress
from mlx_empire.data.batches import MicroBatch
from mlx_empire.engine.gradients import GradientStore, MicroBatchSum
from mlx_empire.engine.layer_calls import Running
from mlx_empire.engine.passes import Passes


@contextmanager
def poisoned(place: str, step: int, rank: int = 0, *, once: bool = False) -> Iterator[None]:
    """In this step of this rank a NaN in `forward`: the input of the first layer, of every micro-batch; or in
    `backward`: the gradient of every layer's first tensor. `once`: only the first time.
    """
    struck = False

    here = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0")) == rank

    def due() -> bool:
        nonlocal struck
        now = here and progress.places()["MainThread"].step == step and not (struck and once)
        struck = struck or now
        return now

    wrap = {"forward": _forward, "backward": _backward}[place]
    restore = wrap(due)
    try:
        yield
    finally:
        restore()


def _forward(due: Callable[[], bool]) -> Callable[[], None]:
    original = Passes.capture

    def capture(self: Passes, position: int, micro: MicroBatch) -> Running:
        running = original(self, position, micro)
        if due():
            running.hidden = running.hidden * mx.nan
        return running

    Passes.capture = capture  # type: ignore[method-assign]
    return lambda: setattr(Passes, "capture", original)


def _backward(due: Callable[[], bool]) -> Callable[[], None]:
    original = GradientStore.inspect

    def inspect(self: GradientStore, index: int, cell: MicroBatchSum) -> None:
        if index > 0 and due():  # the root's sum comes last
            cell.arrays[0] = cell.arrays[0] * mx.nan
        original(self, index, cell)

    GradientStore.inspect = inspect  # type: ignore[method-assign]
    return lambda: setattr(GradientStore, "inspect", original)


if __name__ == "__main__":
    place, step, module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    with poisoned(place, int(step)):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
