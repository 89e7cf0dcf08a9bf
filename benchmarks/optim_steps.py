"""The updates that the optimizer's benchmarks look at: MLX's own AdamW and this project's, each as a step to repeat."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import mlx.core as mx
import mlx.optimizers as stock_optimizers

from mlx_empire.optim.choose import make_optimizer
from mlx_empire.optim.protocol import ChunkId, StepScalars
from mlx_empire.plan.shards import CHUNK_ELEMENTS
from mlx_empire.recipe.update_sections import OptimizerSection

Step = Callable[[], None]
STOCK = "MLX AdamW, float32, compiled"
OURS = "AdamW, 8 bits, exact master"


def stock(elements: int, bias_correction: bool) -> tuple[Step, float]:
    """MLX's AdamW in float32, its update compiled as in mlx-lm's trainer, and the bytes that it must move."""
    rule = stock_optimizers.AdamW(1e-4, bias_correction=bias_correction)
    tree = {"w": mx.zeros((elements // 64, 64))}
    gradient = {"w": mx.random.normal((elements // 64, 64))}
    rule.init(tree)
    compiled = mx.compile(rule.apply_gradients, inputs=rule.state, outputs=rule.state)

    def step() -> None:
        tree["w"] = compiled(gradient, tree)["w"]
        mx.eval(tree, rule.state)

    return step, 4 * 7.0


def ours(elements: int, settings: dict[str, object], chunk: int = CHUNK_ELEMENTS) -> tuple[Step, float]:
    """The flat rule over bfloat16 weights, chunk by chunk as the trainer does, and the bytes that it must move."""
    rule = make_optimizer(OptimizerSection(learning_rate=1e-4, **settings))
    rows = chunk // 64
    chunks = []
    for start in range(0, elements // 64, rows):
        w = mx.zeros((min(rows, elements // 64 - start), 64), mx.bfloat16)
        g = mx.random.normal(w.shape).astype(mx.bfloat16)
        chunks.append([w, rule.init(w, quantised=True), g, ChunkId(1, start, True)])
    mx.eval([part[:3] for part in chunks])
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        for part in chunks:
            w, state, g, identity = part
            part[:2] = rule.update(w, state, g, identity, StepScalars(count, 1e-4))
            mx.eval(part[:2])

    sizes = rule.state_bytes(elements, "bfloat16", quantised=True)
    return step, 2 + 2 * (2 + sum(sizes.values()) / elements)
