"""How often a step asks MLX to evaluate something, and how often the main thread stops for it: then the GPU runs dry.

A layer is gathered, run and differentiated for each micro-batch, reduced, and its norm is taken; the optimizer is asked
chunk by chunk. What does not grow with layers is left out, by the difference between eight layers and four.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from metal.watching import library, watched

COUNTER, STOPS = (Path(__file__).with_name(name) for name in ("counter.py", "stops.py"))
LAYERS = 4  # by which the deeper model is deeper
A_CHUNK = 1
A_LAYER_AND_MICRO_BATCH = 6
CASES = [(1, 2, True), (3, 3, True), (1, 3, False)]  # micro-batches, stage, whether it runs ahead


@pytest.fixture(scope="module")
def built(request):
    return library(request.config.cache.mkdir("watch"))


@pytest.fixture(scope="module")
def counted(built):
    """By (layers, micro-batches, stage, runs ahead): evaluations with work in a step, stops, the optimizer's chunks."""
    asked = [(layers, *case) for layers in (LAYERS, 2 * LAYERS) for case in CASES]
    lines = watched(built, [str(COUNTER), json.dumps(asked)]).splitlines()
    return {tuple(key): found for key, found in map(json.loads, lines)}


@pytest.mark.parametrize("case", CASES)
def test_a_step_evaluates_few_times(counted, case):
    micro_batches, _, _ = case
    few, deep = (counted[(layers, *case)] for layers in (LAYERS, 2 * LAYERS))
    evaluations, chunks = (deep[name] - few[name] for name in ("evaluations", "chunks"))
    assert chunks >= 2 * LAYERS, "a layer has chunks"
    assert evaluations >= 2 * LAYERS * micro_batches, (
        "each layer's forward and backward is evaluated by itself"
    )
    bound = A_LAYER_AND_MICRO_BATCH * micro_batches
    assert evaluations <= bound * LAYERS + A_CHUNK * chunks
    assert few["evaluations"] <= bound * (LAYERS + 1) + A_CHUNK * few["chunks"], "with the root"


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_runs_ahead_seldom_stops(counted, case):
    micro_batches, _, ahead = case
    for layers in (LAYERS, 2 * LAYERS):
        stops = counted[(layers, *case)]["stops"]
        if ahead:  # head and embedding wait for every micro-batch
            assert 0 < stops <= layers / 4 + 10 + 3 * (micro_batches - 1)
        else:
            assert stops == counted[(layers, *case)]["evaluations"] > 8 * layers


def test_the_watch_tells_what_stops_the_main_thread(built):
    found = dict(map(json.loads, watched(built, [str(STOPS)]).splitlines()))
    assert found == {
        "eval": [1, 0, 1],
        "item": [1, 0, 1],
        "numpy": [1, 0, 1],
        "async_eval": [0, 1, 0],
        "numpy of what runs": [0, 0, 1],
        "numpy again": [0, 0, 0],
        "eval of what runs": [0, 0, 1],
        "another thread": [0, 0, 0],
        "eval of what is there": [0, 0, 0],
    }
