"""What an update needs besides, as each rule tells a plan, against MLX's own peak: for every form of state and master,
whether somebody else holds the weights before (they are views of a whole buffer) or nobody does. What the rule says is
never passed; it is reached where MLX's threads are as far apart as they may be, which on a busy machine takes many
updates: `make test-slow` waits for it."""

from __future__ import annotations

import gc

import mlx.core as mx
import pytest

from mlx_empire.optim.adamw import AdamW
from mlx_empire.optim.flat import FlatOptimizer
from mlx_empire.optim.momentum import Lion, Sgd
from mlx_empire.optim.protocol import ChunkId, StepScalars

ROWS = 1 << 12
FORMS = [
    ("float32", "exact"),
    ("float16", "exact"),
    *(("bfloat16", master) for master in ("exact", "diet", "fp32", "none")),
]


def highest(optimizer: FlatOptimizer, dtype: mx.Dtype, *, held: bool, near: float, steps: int) -> float:
    """Bytes per element beside the new weights at the worst moment of up to so many updates: how far MLX's threads are
    apart is chance, so it ends as soon as one comes `near`."""
    weights = mx.random.normal((ROWS, 64)).astype(dtype)
    gradient = mx.random.normal((ROWS, 64))
    state = optimizer.init(weights, quantised=True)
    mx.eval(weights, gradient, state)
    found = 0.0
    for step in range(1, steps + 1):
        kept = weights if held else None
        gc.collect()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        scalars = StepScalars(step, 1e-3)
        weights, state = optimizer.update(weights, state, gradient, ChunkId(1, 0, True), scalars)
        mx.eval(weights, state)
        found = max(found, (mx.get_peak_memory() - before) / weights.size - dtype.size)
        del kept
        if found >= near:
            break
    return found


@pytest.mark.parametrize(("steps", "reached"), [(3, 0.0), pytest.param(300, 0.97, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", [AdamW, Lion, Sgd])
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(("dtype", "master"), FORMS)
def test_an_update_needs_what_the_rule_says(
    rule: type[AdamW | Lion | Sgd], bits: int, dtype: str, master: str, steps: int, reached: float
) -> None:
    optimizer = rule(state_bits=bits, master_weights=master)
    cost = optimizer.state_bytes(64, dtype, quantised=True)
    for held, said in ((True, cost.alone), (False, cost.alone - cost.in_place)):
        found = highest(optimizer, getattr(mx, dtype), held=held, near=0.98 * said, steps=steps)
        assert reached * said <= found <= 1.01 * said, (held, found, said)
