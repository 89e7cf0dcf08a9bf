"""What Metal's fused attention cannot do: odd head dims have scores in the ledger; short rows and sinks."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import pytest
from support.planning import llama_like, node_of, recipe_of
from support.tiny_models import tiny_config, tiny_model

from mlx_empire.engine.streamable import verify_scaled_down
from mlx_empire.errors import UserError
from mlx_empire.model.attention.fused import (
    FALLBACK_VARIABLE,
    READ_IN,
    allow_sinks,
    attention_is_fused,
    refuse_too_short,
)
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan import resolve as resolving
from mlx_empire.plan.activations import attention_scores
from mlx_empire.plan.resolve import resolve
from mlx_empire.train import story as train

# Counted out of `use_fallback` by hand: 100 is Open-Llama-3B's, 8 the tiny model's of the tests.
HEADS = {8: False, 16: False, 64: True, 100: False, 112: False, 128: True, 192: True, 256: True, 512: False}


@pytest.mark.parametrize("head", HEADS)
def test_heads_that_are_not_fused_have_scores(head: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolving, "LINEAR", True)
    recipe, spec = recipe_of(), llama_like()
    spec = replace(spec, config={**spec.config, "head_dim": head})
    plan = resolve(recipe, spec, [node_of("mac", 1 << 40, chip="M3-Ultra")], state_bytes_of(recipe.optimizer))
    assert attention_is_fused(spec.text_config) == HEADS[head]
    assert bool(attention_scores(spec, plan.work)) != HEADS[head]


def test_the_head_dim_follows_from_the_width_where_it_is_not_written() -> None:
    assert attention_is_fused({"hidden_size": 2048, "num_attention_heads": 32})
    assert not attention_is_fused({"hidden_size": 3200, "num_attention_heads": 32})
    assert not attention_is_fused({})


def test_rows_too_short_for_a_backward_are_refused() -> None:
    refuse_too_short(9)
    with pytest.raises(UserError, match=r"data\.sequence_length: 8: .*; use 9 or more"):
        refuse_too_short(8)
    assert train.refuse_too_short is refuse_too_short


def test_a_model_with_sinks_is_differentiated_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's own attention, made to refuse what Metal's refuses in training; the variable is read at each call."""
    attention = mx.fast.scaled_dot_product_attention

    def as_metal(*arrays: mx.array, sinks: mx.array | None = None, mask: Any = None, **more: Any) -> mx.array:
        plain = mask is None or isinstance(mask, str)
        if sinks is not None and plain and os.environ.get(FALLBACK_VARIABLE) != "1":
            raise ValueError("Does not support VJP with respect to mask or attention sinks.")
        return attention(*arrays, sinks=sinks, mask=mask, **more)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", as_metal)
    monkeypatch.delenv(FALLBACK_VARIABLE, raising=False)
    config = tiny_config("gpt_oss")
    with pytest.raises(UserError, match="attention sinks"):
        verify_scaled_down(config, "gpt-oss")
    monkeypatch.setenv(FALLBACK_VARIABLE, "")  # so that it is as before when the test is over
    monkeypatch.delenv(FALLBACK_VARIABLE)
    _, spec = tiny_model("gpt_oss")
    allow_sinks(t.name for unit in spec.units for t in unit.tensors)
    verify_scaled_down(config, "gpt-oss")


def test_other_models_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FALLBACK_VARIABLE, raising=False)
    _, spec = tiny_model("llama")
    allow_sinks(t.name for unit in spec.units for t in unit.tensors)
    assert FALLBACK_VARIABLE not in os.environ


def test_the_rules_are_those_of_the_mlx_that_is_installed():
    """Another version's wheel has to be read again: its rules may be others."""
    assert version("mlx") == READ_IN
