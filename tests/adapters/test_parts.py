"""Full tuning of parts: the last layers, and parameters by their names; all else stays as it is.

The reference is mlx-lm's whole model, of which whoever wrote this unfroze the same modules by hand: gradients by
`nn.value_and_grad`, clipped by the norm of what trains alone, and a textbook AdamW in float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.mpi import run_ranks
from support.stepping import batches_of, config_of, counted_tokens, weights_of, whole_weights
from support.tuning import TunedCase, built_of, textbook_steps, trainable, tuned_trainer

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine.step import StreamedStep
from mlx_empire.errors import UserError
from mlx_empire.model.build import build_model
from mlx_empire.plan.actions import Action
from mlx_empire.recipe.load import parse_recipe

STEPS = 6
Modules = Callable[[nn.Module], Sequence[nn.Module]]
PARTS: dict[str, tuple[dict[str, Any], Modules]] = {
    "last two layers": ({"layers": 2}, lambda m: m.layers[-2:]),
    "norm and head": (
        {"unfrozen_parameters": ["lm_head", "model.norm"]},
        lambda m: [m.lm_head, m.model.norm],
    ),
    "last layer and head": (
        {"layers": 1, "unfrozen_parameters": ["lm_head"]},
        lambda m: [m.layers[-1], m.lm_head],
    ),
    "pieces of layers": (
        {
            "unfrozen_parameters": [
                r"model\.layers\.1\.mlp\.up",
                r".*layers\.3\.(self_attn\.[qk]_proj|input_layernorm)",
            ]
        },
        lambda m: [
            m.layers[1].mlp.up_proj,
            m.layers[3].self_attn.q_proj,
            m.layers[3].self_attn.k_proj,
            m.layers[3].input_layernorm,
        ],
    ),
    "pieces of one shape": (  # two layers that differ by what trains of them alone
        {"unfrozen_parameters": ["model.layers.2.mlp.gate_proj", "model.layers.3.mlp.up_proj"]},
        lambda m: [m.layers[2].mlp.gate_proj, m.layers[3].mlp.up_proj],
    ),
    "embedding": ({"unfrozen_parameters": ["model.embed_tokens"]}, lambda m: [m.model.embed_tokens]),
}
COMMON: dict[str, Any] = {
    "micro_batches": 3,
    "cells": 1,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "clip_norm": 0.05,
}


@pytest.fixture
def thread() -> Iterator[CommThread]:
    with CommThread() as one:
        yield one


def case_of(parts: str, **more: Any) -> TunedCase:
    return TunedCase("llama", tuning={"type": "full", **PARTS[parts][0]}, **{**COMMON, **more})


def reference(case: TunedCase, modules: Modules) -> nn.Module:
    model = build_model(config_of(case), case.family)
    model.load_weights(list(weights_of(case)[2].items()))
    model.freeze()
    for module in modules(model):
        module.unfreeze()
    return model


@pytest.mark.parametrize(
    ("parts", "how"),
    [
        ("last two layers", {"tail": 1}),
        ("last two layers", {"compiled": True}),
        ("norm and head", {}),
        ("last layer and head", {"tail": 1}),
        ("pieces of layers", {"tail": 0, "compiled": True}),
        ("pieces of one shape", {"compiled": True}),
        ("embedding", {"tied": True}),
    ],
    ids=str,
)
def test_steps_are_those_of_the_whole_model_with_the_rest_frozen(
    parts: str, how: dict[str, Any], thread: CommThread
) -> None:
    case = case_of(parts, **how)
    trainer = tuned_trainer(case, SoloCommunicator("here"), thread)
    first, model = whole_weights(trainer), reference(case, PARTS[parts][1])
    start = trainable(model)
    expected_losses, losses, norms = textbook_steps(case, model, STEPS), [], []
    for step in range(STEPS):
        batches = batches_of(case, step)
        result = trainer.train_step(batches, counted_tokens(batches), step + 1, case.learning_rate)
        losses.append(result.loss)
        norms.append(result.gradient_norm)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert all(norm > case.clip_norm for norm in norms), "the clip must matter"
    found, expected = whole_weights(trainer), trainable(model)
    assert expected
    for name, should in expected.items():
        moved = should - start[name]
        assert np.linalg.norm(moved) > 0, name
        assert np.linalg.norm(found[name].reshape(should.shape) - should) <= 0.01 * np.linalg.norm(moved), (
            name
        )
    for name in first.keys() - expected.keys():
        assert found[name].tobytes() == first[name].tobytes(), f"{name} is frozen"


@pytest.mark.parametrize(
    ("parts", "visited"),
    [
        ("last two layers", {3, 4}),
        ("norm and head", set()),
        ("pieces of layers", {2, 3, 4}),
        ("embedding", {1, 2, 3, 4}),
    ],
)
def test_nothing_below_the_lowest_trained_layer_is_differentiated(
    parts: str, visited: set[int], thread: CommThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(parts)
    trainer = tuned_trainer(case, SoloCommunicator("here"), thread)
    played: list[Action] = []
    play = StreamedStep.play

    def noted(self: StreamedStep, actions: Iterator[Action]) -> None:
        listed = list(actions)
        played.extend(listed)
        play(self, listed)

    monkeypatch.setattr(StreamedStep, "play", noted)
    batches = batches_of(case)
    trainer.train_step(batches, counted_tokens(batches), 1, 1e-3)
    assert {a.unit for a in played if a.kind in ("backward", "reuse")} == visited
    assert any(a.kind == "embed" for a in played) == (parts == "embedding")
    trained = {u for u, unit in enumerate(trainer.spec.units) if any(t.trainable for t in unit.tensors)}
    for kind in ("reduce", "settle", "update"):
        assert {a.unit for a in played if a.kind == kind} == trained, kind


# ---- ranks


def cases() -> dict[str, dict[str, Any]]:
    common = {**COMMON, "shares": [3, 1, 2], "cells": 3, "micro_batches": 6, "steps": 3, "family": "llama"}
    return {
        f"{parts}:{stage}": {
            **common,
            "tuning": {"type": "full", **PARTS[parts][0]},
            "stage": stage,
            "tail": stage // 2,
            "state_bits": 8 if parts == "last two layers" else 32,
        }
        for parts in ("last two layers", "norm and head", "pieces of layers")
        for stage in (0, 2, 3)
    }


@cache
def reports(ranks: int) -> list[dict[str, Any]]:
    return run_ranks(ranks, "tests/adapters/worker.py", [json.dumps(cases())])


@pytest.mark.parametrize("parts", ["last two layers", "norm and head", "pieces of layers"])
def test_bits_are_the_same_on_one_two_and_three_ranks_at_any_stage(parts: str) -> None:
    found = [
        {key: one[f"{parts}:{stage}"][key] for key in ("losses", "norms", "weights")}
        for ranks in (1, 2, 3)
        for one in reports(ranks)
        for stage in (0, 2, 3)
    ]
    assert all(one == found[0] for one in found)
    assert found[0]["losses"][-1] != found[0]["losses"][0]


def test_frozen_weights_are_gathered_and_never_reduced() -> None:
    for ranks in (2, 3):
        for rank, one in enumerate(reports(ranks)):
            for name, case in one.items():
                assert case["moved"] == case["planned"], (name, rank)
    whole, sharded = (reports(2)[0][f"norm and head:{stage}"] for stage in (2, 3))
    assert sum(whole["moved"]) * 2 < sum(sharded["moved"])


# ---- what is asked for


def test_names_of_the_spec_are_those_that_were_unfrozen_by_hand() -> None:
    for parts, (_, modules) in PARTS.items():
        spec = built_of(case_of(parts, tied=parts == "embedding")).spec
        ours = {t.name for unit in spec.units for t in unit.tensors if t.trainable}
        by_hand = {
            name
            for name, _ in tree_flatten(
                reference(case_of(parts, tied=parts == "embedding"), modules).trainable_parameters()
            )
        }
        assert ours == by_hand, parts


@pytest.mark.parametrize(
    ("tuning", "said"),
    [
        ({"layers": 9}, "tuning.layers: 9: the model has 4 layers; use 4 or less"),
        (
            {"unfrozen_parameters": ["lm_heads"]},
            "lm_heads: no parameter's name begins so; there are .*lm_head.weight",
        ),
        ({"unfrozen_parameters": ["model.layers.[2"]}, "no regular expression"),
    ],
)
def test_what_the_model_does_not_have_is_refused_with_the_key(tuning: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        built_of(TunedCase("llama", tuning={"type": "full", **tuning}))


def test_adapters_have_no_parts() -> None:
    text = (
        "model: {path: m}\ntuning: {type: lora, unfrozen_parameters: [lm_head]}\n"
        "data: {path: d, sequence_length: 8}\nbatch: {global_size: 1}\n"
        "optimizer: {learning_rate: 1.0e-3}\nrun: {dir: r, steps: 1}\n"
    )
    with pytest.raises(UserError, match=r"tuning\.unfrozen_parameters: .*use type full"):
        parse_recipe(text, "x")
    assert parse_recipe(text.replace("lora", "full"), "x").tuning.of_parts
