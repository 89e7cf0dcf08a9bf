"""8-bit states in a closed loop over the gradients of a real model on real text, against AdamW in float64.

The gradients are recorded once, from a small llama on bytes that trains with the reference; then both
optimizers see the same ones, so every difference is the codec's. The bounds are those it was designed to. Once anew,
and once as the repository keeps a sample of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from optim import reference
from support.recorded import kept_gradients, recorded_gradients

from mlx_empire.optim import codec
from mlx_empire.optim.adamw import AdamW
from mlx_empire.optim.protocol import ChunkId, StepScalars


@pytest.fixture(scope="module", params=[recorded_gradients, kept_gradients])
def gradients(request: pytest.FixtureRequest) -> np.ndarray:
    """Float32 (STEPS, rows, 64)."""
    return request.param()


@dataclass
class Outcome:
    """How far 8-bit states went from float64 ones."""

    update_error: float  # mean over steps of |update - true update| / |true update|
    v_bias: float  # mean of sqrt(v / true v), less 1
    largest_ratio: float  # largest update over the largest true one
    displacement_error: float  # the same as update_error for the sum of all updates


def run(gradients: np.ndarray, beta2: float) -> Outcome:
    optimizer = AdamW((0.9, beta2), state_bits=8)
    w = mx.zeros(gradients.shape[1:])  # with lr 1, less the weights is the sum of the updates
    state = optimizer.init(w, quantised=True)
    w64 = m64 = v64 = np.zeros(gradients.shape[1:])
    errors, ratio = [], 1.0
    for step, g in enumerate(gradients, 1):
        before, before64 = np.array(w, np.float64), w64
        w, state = optimizer.update(w, state, mx.array(g), ChunkId(3, 0, True), StepScalars(step, 1.0))
        w64, m64, v64 = reference.adamw(w64, m64, v64, g, step, 1.0, (0.9, beta2))
        update, true = np.array(w, np.float64) - before, w64 - before64
        errors.append(np.linalg.norm(update - true) / np.linalg.norm(true))
        ratio = max(ratio, np.abs(update).max() / np.abs(true).max())
    known = v64 > 2.0**-90
    v = np.array(codec.decode_second(state), np.float64)
    bias = np.sqrt(v[known] / v64[known]).mean() - 1
    displacement = np.linalg.norm(np.array(w, np.float64) - w64) / np.linalg.norm(w64)
    return Outcome(float(np.mean(errors)), float(bias), float(ratio), float(displacement))


@pytest.mark.parametrize(("beta2", "largest_error"), [(0.999, 0.045), (0.95, 0.03)])
def test_8_bit_states_follow_float64(gradients: np.ndarray, beta2: float, largest_error: float) -> None:
    outcome = run(gradients, beta2)
    assert outcome.update_error <= largest_error
    assert abs(outcome.v_bias) <= 0.005
    assert outcome.largest_ratio <= 1.25
    assert outcome.displacement_error <= 0.04
