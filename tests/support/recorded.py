"""Gradients of a real model on real text, recorded once: what optimizers with quantised states are compared on.

A small llama (SwiGLU, tied head) on bytes of public speeches trains with AdamW in float64; every optimizer then sees
the same gradients, so every difference is its own. They are 72 MB, so they are recorded when they are needed;
`python tests/support/recorded.py` writes the sample of them that is kept in the repository.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import llama

TEXT = Path(__file__).parent.parent / "fixtures" / "speeches"
SAMPLE = Path(__file__).parent.parent / "fixtures" / "gradients.npz"
EVERY = 32  # of the rows one is kept, in bfloat16
STEPS = 400


def recorded_gradients(steps: int = STEPS) -> np.ndarray:
    """Float32 (steps, rows, 64): clipped gradients of all matrices, step by step."""
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
    for step in range(1, steps + 1):
        starts = rng.integers(0, tokens.size - 33, 4)
        _, tree = value_and_grad(model, mx.array(np.stack([tokens[s : s + 33] for s in starts])))
        grads = {k: np.array(v) for k, v in tree_flatten(tree)}
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
        grads = {k: (g * min(1.0, 1 / norm)).astype(np.float32) for k, g in grads.items()}
        recorded.append(np.concatenate([g.reshape(-1, 64) for g in grads.values() if g.ndim == 2]))
        for k, g in grads.items():
            parameters[k], *states[k] = adamw(parameters[k], *states[k], g, step, 2e-3 * min(1, step / 20))
        model.update(tree_unflatten([(k, mx.array(p.astype(np.float32))) for k, p in parameters.items()]))
    return np.stack(recorded)


def adamw(
    w: np.ndarray, m: np.ndarray, v: np.ndarray, g: np.ndarray, step: int, lr: float, beta2: float = 0.999
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """AdamW without decay in float64 (Loshchilov and Hutter, 2019, algorithm 2)."""
    g = g.astype(np.float64)
    m, v = 0.9 * m + 0.1 * g, beta2 * v + (1 - beta2) * g * g
    return w - lr * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - beta2**step)) + 1e-8), m, v


def kept_gradients() -> np.ndarray:
    """Float32 (STEPS, rows, 64): every 32nd row as it was recorded once, whatever MLX computes today."""
    with np.load(SAMPLE) as file:
        return (file["upper"].astype(np.uint32) << 16).view(np.float32)


if __name__ == "__main__":
    bits = recorded_gradients()[:, ::EVERY].view(np.uint32)
    np.savez_compressed(SAMPLE, upper=((bits + 0x8000) >> 16).astype(np.uint16))
