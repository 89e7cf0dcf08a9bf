"""What a trace must leave alone: a layer's modules, MLX's generator and generators of many daughters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_empire.model.together import Present


@contextmanager
def layer_as_before(layer: nn.Module) -> Iterator[None]:
    """RuntimeError, and all is as before, where a call of the layer puts something new into its modules."""
    before = [(module, dict(module), dict(vars(module))) for module in layer.modules()]
    changed = False
    try:
        yield
    finally:
        for module, entries, switches in before:
            for now, then in ((module, entries), (vars(module), switches)):
                if now.keys() != then.keys() or any(now[key] is not then[key] for key in then):
                    changed = True
                    dict.clear(now)
                    dict.update(now, then)  # a module's own does something else
    if changed:
        raise RuntimeError("a call changes the layer")


@contextmanager
def generator_as_before(seeded: bool) -> Iterator[None]:
    """MLX's generator is as before, also where a trace has put its own arrays there. RuntimeError where it was drawn
    from and was not `seeded`."""
    before = _generator()
    drawn = False
    try:
        yield
    finally:
        try:
            drawn = _generator() != before
        except RuntimeError:  # an array of the trace, which has no value
            drawn = True
        if drawn:
            high, low = before
            mx.random.seed(high << 32 | low)
    if drawn and not seeded:
        raise RuntimeError("it draws random numbers that nobody has seeded")


@contextmanager
def states_as_before(present: Sequence[Present]) -> Iterator[None]:
    """Of daughters who draw from generators of their own, as MLX's: a trace has put its own arrays there."""
    before = [(one.states, dict(one.states)) for one in present]
    try:
        yield
    finally:
        for states, then in before:
            states |= then


def _generator() -> list[int]:
    """The two words of its key. RuntimeError while they belong to a trace."""
    state: Any = mx.random.state
    words: list[int] = np.array(state[0]).tolist()
    return words
