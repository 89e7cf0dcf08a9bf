"""Started under the watch: by kind of master weights, what an 8-bit AdamW update of one chunk evaluates, as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

import mlx.core as mx
from support.watching import Watch

from mlx_empire.optim.adamw import AdamW
from mlx_empire.optim.protocol import ChunkId, StepScalars

ROWS = 4096

if __name__ == "__main__":
    for kind in ("exact", "diet"):
        optimizer = AdamW(state_bits=8, master_weights=kind)
        weights, gradient = mx.zeros((ROWS, 64), mx.bfloat16), mx.ones((ROWS, 64))
        state = optimizer.init(weights, quantised=True)
        mx.eval(weights, gradient, state)
        watch = Watch()
        for step in (1, 2):
            with watch.during():
                weights, state = optimizer.update(
                    weights, state, gradient, ChunkId(3, 0, True), StepScalars(step, 1e-4)
                )
                mx.eval(weights, state)
        arrays = (weights, *state.values())
        must = gradient.nbytes + 2 * sum(array.nbytes for array in arrays)
        kinds = [asdict(one) for one in watch.seen[-1].kinds]
        print(json.dumps({"master": kind, "elements": weights.size, "must": must, "kinds": kinds}))
