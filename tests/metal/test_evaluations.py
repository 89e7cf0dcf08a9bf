"""How often a step asks MLX to evaluate something, and how often the main thread stops for it: then the GPU runs dry.

A layer is gathered, run and differentiated for each micro-batch, reduced, and its norm is taken; the optimizer is asked
chunk by chunk. What does not grow with layers is left out, by the difference between eight layers and four.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.planning import MIB, assess, node_of, recipe_of
from support.tiny_models import SMOLLM2, tiny_config
from support.watching import library, watched

from mlx_empire.model.build import build_model, describe

COUNTER, STOPS = (Path(__file__).with_name(name) for name in ("counter.py", "stops.py"))
LAYERS = 4  # by which the deeper model is deeper
MOST = 6  # a layer and micro-batch, beside one a chunk of the optimizer; what there is instead:
A_CHUNK = 1
A_LAYER_AND_MICRO_BATCH = 2  # its forward, its backward
A_LAYER = 3  # its contribution, its norm, and where weights stay whole the views of the new ones
MARKS = 2  # running ahead: small arrays that are there when all before them is
# Micro-batches, stage, whether it runs ahead, the dtype of totals.
CASES = [
    (1, 2, True, "float32"),
    (3, 3, True, "float32"),
    (1, 2, False, "float32"),
    (2, 3, False, "bfloat16"),
    (1, 1, False, "float32"),
]


@pytest.fixture(scope="module")
def built(request):
    return library(request.config.cache.mkdir("watch"))


def count(built, few, cases, *, wide):
    """By case what a model of so `few` layers and one of twice as many do in a step: evaluations, the update's, stops,
    the optimizer's chunks."""
    asked = [(layers, *case, wide, 0) for layers in (few, 2 * few) for case in cases]
    lines = watched(built, [str(COUNTER), json.dumps(asked)]).splitlines()
    found = {tuple(key): numbers for key, numbers in map(json.loads, lines)}
    return {case: tuple(found[(layers, *case, wide, 0)] for layers in (few, 2 * few)) for case in cases}


@pytest.fixture(scope="module")
def counted(built):
    return count(built, LAYERS, CASES, wide=False)


def check_budget(case, few, deep, layers):
    """`few` and `deep` differ by `layers`; returns a layer's evaluations, and of them the optimizer's."""
    micro_batches, _, ahead, totals = case
    evaluations, update, chunks = (deep[name] - few[name] for name in ("evaluations", "update", "chunks"))
    assert chunks >= 2 * layers, "a layer has chunks"
    assert 0 < update <= A_CHUNK * chunks
    bound = A_LAYER_AND_MICRO_BATCH * micro_batches + A_LAYER + (totals == "bfloat16") + MARKS * ahead
    assert evaluations - update <= MOST * micro_batches * layers
    assert A_LAYER_AND_MICRO_BATCH * micro_batches * layers <= evaluations - update <= bound * layers
    # The root is captured, has its head and embedding, and is rounded tensor by tensor.
    assert few["evaluations"] - few["update"] <= bound * layers + 3 * micro_batches + 6
    return evaluations / layers, update / layers


@pytest.mark.parametrize("case", CASES)
def test_a_step_evaluates_few_times(counted, case):
    check_budget(case, *counted[case], LAYERS)


@pytest.mark.parametrize("case", CASES)
def test_nothing_waits_for_the_embeddings_gradient_but_the_roots_sum(counted, case):
    for found in counted[case]:
        assert found["embed"] == [case[0], 0], "one evaluation a micro-batch, and no stop"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_layer_of_smollm2_is_evaluated_eleven_or_twelve_times(built, stage):
    """Of them seven by the optimizer, for nine chunks. It was 45."""
    case = 1, stage, False, "float32"
    found = count(built, 1, [case], wide=True)
    assert check_budget(case, *found[case], 1) == (11 + (stage == 2), 7)


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_runs_ahead_seldom_stops(counted, case):
    micro_batches, _, ahead, _ = case
    for layers, found in zip((LAYERS, 2 * LAYERS), counted[case], strict=True):
        stops = found["stops"]
        if ahead:  # the head waits for every micro-batch
            assert 0 < stops <= layers / 4 + 10 + 2 * (micro_batches - 1)
        else:  # for all but the embedding's
            assert stops == found["evaluations"] - micro_batches > 4 * layers


SIZES = tiny_config("llama", **SMOLLM2, num_hidden_layers=30, tie_word_embeddings=True)
AUTO = ("memory.gradient_checkpointing=auto", "memory.run_ahead=auto")
RECOMPUTED = ("memory.gradient_checkpointing=true", "memory.run_ahead=true")


@pytest.mark.parametrize(
    ("words", "wide"),
    [
        pytest.param(AUTO, False, id="auto"),
        pytest.param(AUTO, True, id="auto, wide", marks=pytest.mark.slow),
        pytest.param(RECOMPUTED, False, id="recomputed", marks=pytest.mark.slow),
    ],
)
def test_a_step_of_smollm2_seldom_stops(built, words, wide):
    """As its 30 layers are planned on one CPU that has room for them."""
    spec = describe(build_model(SIZES, "llama"), SIZES, "llama", "bfloat16")
    recipe = recipe_of("data.sequence_length=256", *words)
    plan = assess(recipe, spec, [node_of("here", 16 * 1024 * MIB)]).plan
    assert plan.work.run_ahead
    assert plan.work.unrecomputed == (30 if words == AUTO else 0)
    asked = 30, 1, plan.shards.zero_stage, True, "float32", wide, plan.work.unrecomputed
    _, found = json.loads(watched(built, [str(COUNTER), json.dumps([asked])]))
    assert 0 < found["stops"] <= 30 / 4 + 10, found


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
