"""8-bit states in a closed loop over the gradients of a real model on real text, against AdamW in float64.

The gradients are recorded once, from a small llama on bytes that trains with the reference; then both
optimizers see the same ones, so every difference is the codec's. The bounds are those it was designed to.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import llama
from optim import reference

from mlx_empire.optim import codec
from mlx_empire.optim.adamw import AdamW
from mlx_empire.optim.protocol import ChunkId, StepScalars

TEXT = Path(__file__).parent.parent / "fixtures" / "speeches"
STEPS = 400


@pytest.fixture(scope="module")
def gradients() -> np.ndarray:
    """Float32 (STEPS, rows, 64): clipped gradients of all matrices, step by step."""
    mx.random.seed(0)
    rng = np.random.default_rng(0)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=64,
            num_hidden_layers=1,
            intermediate_size=128,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=128,
            tie_word_embeddings=True,
        )
    )
    text = b"".join(path.read_bytes() for path in sorted(TEXT.glob("*.jsonl")))
    tokens = np.frombuffer(text, np.uint8).astype(np.int32) % 128

    def loss(model: nn.Module, rows: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(rows[:, :-1]), rows[:, 1:], reduction="mean")

    value_and_grad = nn.value_and_grad(model, loss)
    parameters = {k: np.array(v, np.float64) for k, v in tree_flatten(model.parameters())}
    states = {k: (np.zeros_like(v), np.zeros_like(v)) for k, v in parameters.items()}
    recorded = []
    for step in range(1, STEPS + 1):
        starts = rng.integers(0, tokens.size - 33, 4)
        _, tree = value_and_grad(model, mx.array(np.stack([tokens[s : s + 33] for s in starts])))
        grads = {k: np.array(v) for k, v in tree_flatten(tree)}
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
        grads = {k: (g * min(1.0, 1 / norm)).astype(np.float32) for k, g in grads.items()}
        recorded.append(np.concatenate([g.reshape(-1, 64) for g in grads.values() if g.ndim == 2]))
        for k, g in grads.items():
            parameters[k], *states[k] = reference.adamw(
                parameters[k], *states[k], g, step, 2e-3 * min(1, step / 20)
            )
        model.update(tree_unflatten([(k, mx.array(p.astype(np.float32))) for k, p in parameters.items()]))
    return np.stack(recorded)


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
