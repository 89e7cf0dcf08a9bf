"""What completes a bfloat16 weight under AdamW: exact, in float32, and lossy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from optim import reference
from optim.test_adamw import CHUNK, gradient, start

from mlx_empire.optim import master
from mlx_empire.optim.adamw import AdamW
from mlx_empire.optim.protocol import StepScalars


@pytest.mark.parametrize("bits", [32, 8])
def test_exact_master_is_training_in_float32(bits: int) -> None:
    """bf16 weights + remainder against an fp32 master with a bf16 copy that the gradient is taken at."""
    optimizer = AdamW(weight_decay=0.1, state_bits=bits)
    copy = reference.bf16_copy(start())
    full = mx.array(copy)
    full_state = optimizer.init(full, quantised=True)
    weights = mx.array(copy).astype(mx.bfloat16)
    state = optimizer.init(weights, quantised=True)
    moved = 0
    for step in range(1, 60):
        scalars = StepScalars(step, 1e-5, 0.7)  # far below half a bf16 step of most weights

        def grad(at: np.ndarray, step: int = step) -> mx.array:
            return mx.array((0.1 * at + gradient(step)).astype(np.float32))

        copy = reference.bf16_copy(np.array(full))
        full, full_state = optimizer.update(full, full_state, grad(copy), CHUNK, scalars)
        seen = np.array(weights.astype(mx.float32))
        np.testing.assert_array_equal(seen, copy)
        before = weights
        weights, state = optimizer.update(weights, state, grad(seen), CHUNK, scalars)
        joined = master.join(weights, state["remainder"])
        np.testing.assert_array_equal(np.array(joined.view(mx.uint32)), np.array(full.view(mx.uint32)))
        moved += int(mx.sum(before != weights).item())
    assert moved > 0
    assert all(mx.array_equal(state[name], full_state[name]).item() for name in full_state)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_whole_fp32_master_trains_like_the_exact_one(bits: int) -> None:
    two = [AdamW(weight_decay=0.1, state_bits=bits, master_weights=kind) for kind in ("exact", "fp32")]
    weights = [mx.array(start()).astype(mx.bfloat16)] * 2
    states = [o.init(w, quantised=True) for o, w in zip(two, weights, strict=True)]
    for step in range(1, 30):
        g, scalars = mx.array(gradient(step)).astype(mx.bfloat16), StepScalars(step, 1e-5, 0.7)
        for i, optimizer in enumerate(two):
            weights[i], states[i] = optimizer.update(weights[i], states[i], g, CHUNK, scalars)
        assert mx.array_equal(weights[0], weights[1]).item()
        masters = [master.joined(w, s) for w, s in zip(weights, states, strict=True)]
        assert mx.array_equal(masters[0].view(mx.uint32), masters[1].view(mx.uint32)).item()
    assert not mx.array_equal(weights[0], mx.array(start()).astype(mx.bfloat16)).item()


@pytest.mark.parametrize(("kind", "bound"), [("diet", 0.05), ("none", 1.2)])
def test_lossy_masters_move_as_far_as_the_exact_one_on_average(kind: str, bound: float) -> None:
    """300 steps of one direction at lr 1e-5, far below a bf16 step: rounding to nearest would not move at all."""
    optimizer = AdamW(master_weights=kind)
    first = np.where(np.random.default_rng(3).random((512, 64)) < 0.5, -1, 1) * np.float32(0.7)
    weights = mx.array(first).astype(mx.bfloat16)
    begun = np.array(weights.astype(mx.float32), np.float64)
    state = optimizer.init(weights, quantised=True)
    for step in range(1, 301):
        weights, state = optimizer.update(weights, state, mx.ones((512, 64)), CHUNK, StepScalars(step, 1e-5))
    moved = np.array(master.joined(weights, state), np.float64) - begun
    assert abs(moved.mean() / -3e-3 - 1) <= 0.02
    assert np.sqrt(((moved + 3e-3) ** 2).mean()) / 3e-3 <= bound
