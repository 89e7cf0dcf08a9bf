"""No call of `mx.fast` that is differentiated ends in an error on Metal, and the ledger's word on scores is true.

Of each published model one of the same architecture is asked whose heads are small but fused where the real ones are,
and of each family of the tests the tiny one. Graphs are built and not evaluated. Every day a few models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import mlx.core as mx
import mlx.nn as nn
import pytest
from metal.fast_calls import ATTENTION, COMPOSED, FORWARD, FUSED, FastCall, noted_calls, on_metal
from support import published
from support.stepping import Case, batches_of, counted_tokens, own_batches, trainer_of
from support.tiny_models import FAMILIES, OTHER_FAMILIES, tiny_config

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine.streamable import _batch
from mlx_empire.model.attention.fused import FALLBACK_VARIABLE, FUSED_HEAD_DIMS, allow_sinks
from mlx_empire.model.build import build_model, describe
from mlx_empire.model.quantize import unpacked
from mlx_empire.model.scaled_down import scaled_down_config
from mlx_empire.model.spec import ModelSpec
from mlx_empire.plan.activations import PLAINLY_CAUSAL, needs_no_scores
from mlx_empire.plan.workload import CellLayout, Workload

# Those that are refused before they are scaled down.
NOT_HERE = {"falcon-h1-1.5b", "mamba2-codestral-7b"}
PUBLISHED = [name for name in published.names() if name not in NOT_HERE]
DAILY = (
    *(
        "llama-3.1-8b",
        "qwen3-next-80b-a3b",
        "gemma-3-12b-it",
        "gemma-4-31b-dense",
        "deepseek-v3-671b",
        "internlm3-8b",
    ),
    *("llama-4-scout-109b", "phi-3-mini-3.8b", "lfm2-1.2b", "nemotron-h-8b", "olmo-3-7b", "openelm-270m"),
    *("glm-4.5-air", "gpt-oss-20b-bf16", "mimo-v2-flash", "falcon-40b", "olmo-7b-instruct"),
)
MODELS = [*(f for f in (*FAMILIES, *OTHER_FAMILIES)), *PUBLISHED]
PARTS = [
    pytest.param(name, marks=() if name in DAILY or name in FAMILIES else pytest.mark.slow) for name in MODELS
]


@cache
def asked(name: str, width: int = 48) -> tuple[ModelSpec, frozenset[FastCall]]:
    """A small model of this name, and what its loss asks of `mx.fast` while it is differentiated."""
    tiny = name in (*FAMILIES, *OTHER_FAMILIES)
    config = tiny_config(name) if tiny else published.config_of(name)
    small = config if tiny else unpacked(scaled_down_config(config, fused=FUSED_HEAD_DIMS))
    model = build_model(small, name)
    model.set_dtype(mx.bfloat16)
    model.train()
    tokens = mx.array(_batch().inputs[:, :width])
    with noted_calls() as calls:
        nn.value_and_grad(model, lambda m, t: m(t).astype(mx.float32).sum())(model, tokens)
    return describe(model, small, name, "bfloat16"), frozenset(calls)


@contextmanager
def sinks_allowed(spec: ModelSpec) -> Iterator[None]:
    """As a run does before its first backward; as it was afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FALLBACK_VARIABLE, "")
        patch.delenv(FALLBACK_VARIABLE)
        allow_sinks(tensor.name for unit in spec.units for tensor in unit.tensors)
        yield


@pytest.mark.parametrize("name", PARTS)
def test_nothing_that_is_differentiated_ends_in_an_error(name):
    spec, calls = asked(name)
    with sinks_allowed(spec):
        assert {said for call in calls if (said := on_metal(call)) not in (FUSED, COMPOSED)} == set()


@pytest.mark.parametrize("name", PARTS)
def test_where_the_ledger_counts_no_scores_attention_is_fused(name):
    spec, calls = asked(name)
    work = Workload(1, 48, CellLayout(1, 1, 1), 0, "float32", "auto", 8192, linear_attention=True)
    with sinks_allowed(spec):
        attentions = {on_metal(call) for call in calls if call.name == ATTENTION}
    if needs_no_scores(spec, work):
        assert attentions == {FUSED}
    elif spec.family in PLAINLY_CAUSAL and not spec.text_config.get("sliding_window"):
        assert FUSED not in attentions


def test_sinks_that_are_not_allowed_for_are_told(monkeypatch):
    monkeypatch.delenv(FALLBACK_VARIABLE, raising=False)
    assert any("sinks" in on_metal(call) for call in asked("gpt-oss-20b-bf16")[1])


def test_rows_of_8_positions_are_told():
    assert any("logsumexp" in on_metal(call) for call in asked("llama-3.1-8b", 8)[1])
    assert not any("error" in on_metal(call) for call in asked("llama-3.1-8b", 9)[1])


@pytest.mark.parametrize("strict", [True, False])
def test_a_step_meets_another_kernel_in_the_forward_than_in_the_backward_unless_bits_are_strict(strict):
    """So with fast bits may hang on what is recomputed (docs/limits.md)."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    case = Case("llama", micro_batches=1, rows=1, width=16, config=heads)
    batches = batches_of(case)
    with CommThread() as thread:
        trainer = trainer_of(replace(case, strict=strict), SoloCommunicator("here"), thread)
        with noted_calls() as calls:
            trainer.compute(own_batches(trainer, batches, 0), counted_tokens(batches))
    attentions = {(call.differentiated, on_metal(call)) for call in calls if call.name == ATTENTION}
    assert attentions == ({(True, FUSED)} if strict else {(False, FORWARD), (True, FUSED)})
    assert {call.name for call in calls} >= {ATTENTION, "rms_norm", "rope"}


def test_more_models_are_asked_than_the_tests_families():
    modules = {published.module_of(name) for name in PUBLISHED} - {*FAMILIES, *OTHER_FAMILIES}
    daily = {published.module_of(name) for name in DAILY} - {*FAMILIES, *OTHER_FAMILIES}
    assert len(modules) >= 25
    assert len(daily) >= 8
