"""Daughters that are trained together against the same daughters trained alone by mlx-lm's own layers."""

import re
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from support.stepping import batches_of, counted_tokens, inputs_of, weights_of
from support.tuning import (
    SEED,
    HeldWeights,
    TunedCase,
    built_of,
    reference_model,
    seeded,
    textbook_steps,
    trainable,
)

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine.multi_adapter import MultiAdapterSteps, StepInput
from mlx_empire.engine.trainer import Trainer, TrainerSettings
from mlx_empire.formats.source import TunedSource
from mlx_empire.model.build import describe
from mlx_empire.model.lora import initial_adapter
from mlx_empire.model.spec import TensorSpec, own_name
from mlx_empire.model.together import put_together
from mlx_empire.optim.adamw import AdamW
from mlx_empire.plan.shards import make_plan
from mlx_empire.plan.workload import Workload, cell_layout

STEPS = 5
COMMON = {
    "micro_batches": 3,
    "cells": 1,
    "rows": 2,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "clip_norm": 0.05,
}
CASES = {
    "lora": TunedCase("llama", tuning={"type": "lora", "rank": 4}, **COMMON),
    "qlora": TunedCase("llama", tuning={"type": "qlora", "rank": 4}, **COMMON),
    "mixture": TunedCase("qwen3_moe", tuning={"type": "lora", "rank": 4}, **COMMON),
    "dora": TunedCase("llama", tuning={"type": "dora", "rank": 4}, **COMMON),
    "experts": TunedCase(
        "qwen3_moe", tuning={"type": "lora", "rank": 4, "targets": ["all-linear", "experts"]}, **COMMON
    ),
    "embedding and head": TunedCase(
        "qwen3_moe",
        tuning={"type": "lora", "rank": 4, "targets": ["all-linear", "embed_tokens", "lm_head"]},
        **COMMON,
    ),
    "tied embedding": TunedCase(
        "llama",
        tied=True,
        tuning={"type": "lora", "rank": 4, "targets": ["all-linear", "embed_tokens"]},
        **COMMON,
    ),
    "released": TunedCase(
        "llama",
        tied=True,
        release=True,
        tuning={"type": "lora", "rank": 4, "targets": ["all-linear", "embed_tokens"]},
        **COMMON,
    ),
    "dropout": TunedCase("llama", tuning={"type": "lora", "rank": 4, "dropout": 0.3}, **COMMON),
    "dropout of experts": TunedCase(
        "qwen3_moe",
        tuning={"type": "lora", "rank": 4, "targets": ["all-linear", "experts"], "dropout": 0.3},
        **COMMON,
    ),
    "packed rows": TunedCase("llama", packed=True, tuning={"type": "lora", "rank": 4}, **COMMON),
    "packed rows, inputs in a file": TunedCase(
        "llama", packed=True, offload=True, tuning={"type": "lora", "rank": 4}, **COMMON
    ),
}


def cohort_of(case, places, thread, *, compiled=False):
    built = built_of(case)
    present = put_together(built.model, places)
    spec = describe(built.model, built.spec.config, case.family, case.dtype)
    work = Workload(
        case.rows * places, case.width, cell_layout(case.micro_batches, 1, 1, 1), 1, "float32", "auto", 8192
    )
    work = replace(work, optimizer_in_backward=case.release, compiled=compiled, offload=case.offload)
    optimizer = AdamW(weight_decay=case.weight_decay, state_bits=case.state_bits)
    noise = SEED if case.tuning.get("dropout") else None
    comm, settings = SoloCommunicator("here"), TrainerSettings(noise_seed=noise)
    plan = make_plan(spec.units, [1.0], 2)
    inputs = inputs_of(spec, plan, work, 0)
    trainer = Trainer(built.model, spec, plan, work, comm, thread, optimizer, settings, inputs)
    source = TunedSource(HeldWeights(built.base, weights_of(case)[2]), spec, SEED, built.packing)
    for index in range(len(spec.units)):
        trainer.store.load(index, source.unit(index))
    trainer.prepare(packing=case.packed, together=places)
    return MultiAdapterSteps(trainer, present, case.clip_norm, SEED)


def given(case, daughter, step):
    """Every daughter has other data: those of other steps of the case."""
    batches = batches_of(case, 20 * daughter + step)
    return StepInput(batches, counted_tokens(batches), step + 1, case.learning_rate)


def alone(case, daughter):
    """The textbook's adapter of one daughter after its steps, the one before, and its losses."""
    import support.tuning as tuning

    model = seeded(reference_model(case)) if case.tuning.get("dropout") else reference_model(case)
    start = {
        name: mx.array(w)  # DoRA's magnitude is the base's
        if name.endswith(".m")
        else initial_adapter(TensorSpec(plain_name(name), tuple(w.shape), "float32"), SEED)
        for name, w in trainable(model).items()
    }
    model.load_weights([(name, mx.array(w)) for name, w in start.items()], strict=False)
    plain = tuning.batches_of
    try:
        tuning.batches_of = lambda case, step: plain(case, 20 * daughter + step)
        losses = textbook_steps(case, model, STEPS)
    finally:
        tuning.batches_of = plain
    ended = trainable(model)
    return *({plain_name(name): a for name, a in one.items()} for one in (ended, start)), losses


def plain_name(name):
    """Without the `.layer` of a model whose layers are seeded."""
    return re.sub(r"(layers\.\d+)\.layer\.", r"\1.", name)


def check(found, expected, start):
    assert found.keys() == expected.keys()
    for name, should in expected.items():
        moved = should - np.array(start[name])
        assert np.linalg.norm(moved) > 0
        assert np.linalg.norm(np.array(found[name]) - should) <= 0.01 * np.linalg.norm(moved), name
        # AdamW divides by a root: an element whose gradient is nearly zero shows the order of additions.
        assert np.abs(np.array(found[name]) - should).max() <= 4e-5, name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_learns_what_it_learns_alone(case):
    """Three in three places; the second begins two steps later, and the third one's place was another's before."""
    with CommThread() as thread:
        adapters = cohort_of(case, 3, thread)
        for place in range(3):
            adapters.begin(place)
        losses = {0: [], 1: [], 2: []}
        for step in range(2):
            outcomes = adapters.step({0: given(case, 0, step), 2: given(case, 9, step)})
            losses[0].append(outcomes[0].loss)
        adapters.begin(2)
        for step in range(STEPS):
            inputs = {1: given(case, 1, step), 2: given(case, 2, step)}
            if step + 2 < STEPS:
                inputs[0] = given(case, 0, step + 2)
            outcomes = adapters.step(inputs)
            assert outcomes.keys() == inputs.keys()
            for place, outcome in outcomes.items():
                losses[place].append(outcome.loss)
        for daughter in range(3):
            expected, start, curve = alone(case, daughter)
            check(adapters.adapter(daughter), expected, start)
            assert losses[daughter] == pytest.approx(curve, rel=1e-5)


IN_COMPANY = ["dora", "experts", "embedding and head", "released", "dropout", "dropout of experts"]


@pytest.mark.parametrize("case", IN_COMPANY)
def test_each_has_the_bits_that_it_has_alone_in_a_place(case):
    """The second one's rows are longer than the first one's, in every other micro-batch, and it is a step ahead."""
    case = CASES[case]

    def own(place, step):
        asked = given(case, place, step + place)
        if place == 0:
            return asked
        return replace(
            asked, micro_batches=[one_wider(b, 32 * (j % 2)) for j, b in enumerate(asked.micro_batches)]
        )

    with CommThread() as thread:
        many = cohort_of(case, 2, thread)
        for place in range(2):
            many.begin(place)
        outcomes = [many.step({p: own(p, step) for p in range(2)}) for step in range(2)]
        for place in range(2):
            one = cohort_of(case, 1, thread)
            one.begin(0)
            assert [one.step({0: own(place, step)})[0] for step in range(2)] == [
                outcome[place] for outcome in outcomes
            ]
            expected, found = one.adapter(0), many.adapter(place)
            assert all(mx.array_equal(found[n], expected[n]) for n in expected)


def one_wider(batch, columns):
    """The micro-batch, padded on the right by so many columns."""
    wide = {
        name: np.pad(getattr(batch, name), ((0, 0), (0, columns))) for name in ("inputs", "targets", "mask")
    }
    return replace(batch, **wide)


def test_traced_layers_drop_out_alike():
    case = CASES["dropout"]
    with CommThread() as thread:
        found = []
        for compiled in (False, True):
            many = cohort_of(case, 2, thread, compiled=compiled)
            for place in range(2):
                many.begin(place)
            for step in range(2):
                many.step({p: given(case, p, step + p) for p in range(2)})
            assert many._trainer._passes.traces.untraced == {}
            found.append(many.adapter(1))
        assert all(mx.array_equal(found[0][n], found[1][n]) for n in found[0])


@pytest.mark.parametrize("case", [CASES["lora"], CASES["released"]], ids=["lora", "released"])
def test_a_daughter_who_breaks_does_not_hurt_the_others(case):
    with CommThread() as thread:
        whole, broken = (cohort_of(case, 2, thread) for _ in range(2))
        for adapters in (whole, broken):
            adapters.begin(0)
            adapters.begin(1)
        name = next(n for n in broken._tensors[1] if n.endswith("lora_a"))
        shape = broken._trainer.store.plan.tensors[name][2].tensor.shape
        broken._trainer.store.put({name: mx.full(shape, mx.nan)})
        for step in range(2):
            inputs = {0: given(case, 0, step), 1: given(case, 1, step)}
            expected, outcomes = whole.step(inputs), broken.step(inputs)
            assert outcomes[0] == expected[0]
            assert np.isfinite(outcomes[0].loss)
            assert not np.isfinite(outcomes[1].norm)
        expected, found = whole.adapter(0), broken.adapter(0)
        assert all(mx.array_equal(found[n], expected[n]) for n in expected)


def test_held_out_losses_are_hers_alone():
    case = CASES["lora"]
    with CommThread() as thread:
        adapters = cohort_of(case, 2, thread)
        adapters.begin(0)
        adapters.begin(1)
        batches = batches_of(case, 7)
        before = adapters.held_out(1, batches, 2)
        assert adapters.held_out(0, batches, 2) == before
        for step in range(3):
            adapters.step({1: given(case, 1, step)})
        assert adapters.held_out(0, batches, 2) == before
        assert adapters.held_out(1, batches, 2) != before


def test_names():
    assert own_name("model.layers.0.self_attn.q_proj.daughters.12.lora_a") == (
        12,
        "model.layers.0.self_attn.q_proj.lora_a",
    )
    assert own_name("model.norm.weight") == (0, "model.norm.weight")
