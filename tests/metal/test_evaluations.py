"""How often a step asks MLX to evaluate something: every time, the GPU runs dry.

A layer is gathered, run and differentiated for each micro-batch, reduced, and its norm is taken; the optimizer is asked
chunk by chunk. What does not grow with layers is left out, by the difference between eight layers and four.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from metal.watching import library, watched

COUNTER = Path(__file__).with_name("counter.py")
LAYERS = 4  # by which the deeper model is deeper
A_LAYER_AND_MICRO_BATCH, A_CHUNK = 16, 1  # nine of them make a tensor of the layer flat for the exchange


@pytest.fixture(scope="module")
def counted(request):
    """By (layers, micro-batches): evaluations with work in a step, and the optimizer's chunks."""
    built = library(request.config.cache.mkdir("watch"))
    lines = watched(built, [str(COUNTER)]).splitlines()
    return {tuple(key): (evaluations, chunks) for key, evaluations, chunks in map(json.loads, lines)}


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_step_evaluates_few_times(counted, micro_batches):
    few, deep = (counted[layers, micro_batches] for layers in (LAYERS, 2 * LAYERS))
    evaluations, chunks = (b - a for a, b in zip(few, deep, strict=True))
    assert chunks >= 2 * LAYERS, "a layer has chunks"
    assert evaluations >= 2 * LAYERS * micro_batches, (
        "each layer's forward and backward is evaluated by itself"
    )
    assert evaluations <= A_LAYER_AND_MICRO_BATCH * LAYERS * micro_batches + A_CHUNK * chunks
    assert few[0] <= A_LAYER_AND_MICRO_BATCH * (LAYERS + 1) * micro_batches + A_CHUNK * few[1], (
        "with the root"
    )
