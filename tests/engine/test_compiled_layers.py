"""Layers that run by one compiled trace give, to the last bit, what layers give that are called one by one.

What those give is held against whole models and the oracle elsewhere.
"""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama
from oracle.settings import SETTINGS
from support.mpi import run_ranks
from support.stepping import (
    Case,
    batches_of,
    counted_tokens,
    digest,
    own_batches,
    trainer_of,
    whole_weights,
)
from support.tuning import TunedCase, tuned_trainer

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine import traces
from mlx_empire.engine.traces import function_of
from mlx_empire.engine.trainer import Trainer
from mlx_empire.model.layers import LayerArguments
from mlx_empire.model.together import Present

DAILY = ("llama stage 0 packed", "qwen3_moe stage 2 lora", "llama stage 3 tail 0 cells 4")
LONG = {"width": 600, "by_pattern": True, "packed": True, "micro_batches": 2, "cells": 2}
PATTERNED = ("llama stage 3 tail 0 cells 4", "gpt_oss stage 3 tail 0")
LAUNCHES = [
    pytest.param(2, {}, DAILY, id="2 daily"),
    pytest.param(1, LONG, PATTERNED, id="1 long rows", marks=pytest.mark.slow),
    *(
        pytest.param(ranks, more, tuple(SETTINGS), id=f"{ranks} all{kept}", marks=pytest.mark.slow)
        for ranks in (1, 2, 3)
        for kept, more in (("", {}), (" kept", {"kept": 0.4}))
    ),
]


@cache
def bits(ranks: int, words: tuple[str, ...]) -> dict[str, list[Any]]:
    """By setting what the step gives that calls layers, and the one that runs traces."""
    found: dict[str, list[Any]] = run_ranks(
        ranks, "tests/engine/switch_worker.py", list(words), timeout=3600
    )[0]
    return found


@pytest.mark.parametrize(("ranks", "more", "names"), LAUNCHES)
def test_a_trace_changes_no_bit(ranks, more, names):
    found = bits(ranks, tuple(json.dumps(word) for word in ("compiled", more, names)))
    assert found.keys() == set(names)
    for name, (called, traced) in found.items():
        assert traced == called, name


# ---- which layers are traced, and how often

SMALL = {"micro_batches": 2, "rows": 1, "width": 16, "steps": 2}


def run(case: Case) -> tuple[dict[str, Any], Trainer, list[str]]:
    """Steps of a case: what they gave to the last bit, the trainer, and what was said of layers."""
    comm, losses, said = SoloCommunicator("here"), [], []
    with CommThread() as thread:
        trainer = (tuned_trainer if isinstance(case, TunedCase) else trainer_of)(case, comm, thread)
        for step in range(case.steps):
            batches = batches_of(case, step)
            own = own_batches(trainer, batches, 0)
            result = trainer.train_step(own, counted_tokens(batches), step + 1, 1e-3)
            losses.append(result.loss)
            said += result.untraced
        return {"losses": losses, "weights": digest(whole_weights(trainer))}, trainer, said


def both(family: str = "llama", tuning: dict[str, Any] | None = None) -> tuple[int, list[str]]:
    """How many traces a case's steps made, and what was said, once their bits are those of called layers."""
    kind, more = (Case, {}) if tuning is None else (TunedCase, {"tuning": tuning})
    called, _, _ = run(kind(family, **SMALL, **more))
    traced, trainer, said = run(kind(family, **SMALL, **more, compiled=True))
    assert traced == called
    return len(trainer.streamed._passes.traces._known), said


def test_all_layers_of_a_kind_run_by_one_trace_of_the_forward_and_one_of_the_vjp():
    assert both() == (2, [])


def test_what_is_frozen_is_no_constant_of_a_trace_and_noise_is_each_layer_s_own():
    assert both(tuning={"type": "lora", "dropout": 0.2}) == (2, [])


@pytest.mark.slow
def test_layers_that_differ_have_traces_of_their_own():
    """Llama 4 has layers that rotate, and others that do not."""
    made, said = both("llama4")
    assert made == 4
    assert not said


CALL = llama.TransformerBlock.__call__


def looks_at_numbers(self, x, *rest, **more):
    return CALL(self, x, *rest, **more) * (1.0 if x.sum().item() < 1e30 else 2.0)


def changes_itself(self, x, *rest, **more):
    self.seen = x
    return CALL(self, x, *rest, **more)


def takes_powers(self, x, *rest, **more):
    return CALL(self, x, *rest, **more) + 1e-3 * x**2


def draws(self, x, *rest, **more):
    mx.random.normal((1,))
    return CALL(self, x, *rest, **more)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (looks_at_numbers, "eval"),
        (changes_itself, "a call changes the layer"),
        (takes_powers, "powers"),
        (draws, "random numbers that nobody has seeded"),
    ],
)
def test_a_layer_that_cannot_be_traced_is_called_and_said_once(call, why, monkeypatch):
    monkeypatch.setattr(llama.TransformerBlock, "__call__", call)
    made, said = both()
    assert made == 0
    (line,) = said
    assert "numerics.compiled_layers: layers of mlx_lm.models.llama.TransformerBlock cannot be traced" in line
    assert why in line
    assert "\n" not in line
    assert np.isfinite(np.array(mx.random.normal((1,)))).all(), "the generator is whole"


@dataclass(frozen=True)
class Telling:
    """What a model passes to its layers beside arrays and plain values."""


def test_a_layer_that_is_given_an_unknown_object_is_called_and_said_once(monkeypatch):
    """A later object may lie at the address of the one that was there at the trace."""
    model = llama.LlamaModel.__call__
    monkeypatch.setattr(
        llama.LlamaModel,
        "__call__",
        lambda self, inputs, *_, **more: model(self, inputs, [Telling()] * len(self.layers)),
    )
    monkeypatch.setattr(
        llama.TransformerBlock, "__call__", lambda self, x, mask, cache: CALL(self, x, mask, None)
    )
    made, (line,) = both()
    assert made == 0
    assert "(it is given a Telling, which is neither an array nor a plain value)" in line


def test_a_trace_holds_none_of_the_arrays_that_a_layer_was_given(monkeypatch):
    given, taken = [], traces.without_arrays

    def noting(arguments: LayerArguments) -> Any:
        arrays, *rest = taken(arguments)
        given.extend(map(weakref.ref, arrays))
        return arrays, *rest

    monkeypatch.setattr(traces, "without_arrays", noting)
    monkeypatch.setattr(
        llama, "create_attention_mask", lambda h, _: mx.tril(mx.ones((h.shape[1],) * 2, mx.bool_))
    )
    _, trainer, said = run(Case(**SMALL, compiled=True))
    passes = trainer.streamed._passes
    passes.begin()  # what the last step's micro-batches were given goes
    gc.collect()
    assert not said
    assert len(passes.traces._known) == 2
    assert given
    assert not any(mask() is not None for mask in given)


def test_all_that_a_trace_is_given_is_laid_out_by_rows(monkeypatch):
    """Kernels for another layout would be built behind the lock's back, after the first evaluation."""
    compile_, laid_out = mx.compile, []

    def noting(function: Any, inputs: Any = None, **more: Any) -> Any:
        compiled = compile_(function, inputs=inputs, **more)

        def call(*arrays: mx.array) -> Any:
            mx.eval(arrays)
            laid_out.extend(memoryview(array).c_contiguous for array in arrays)
            return compiled(*arrays)

        return call if isinstance(inputs, list) and inputs[0] is mx.random.state else compiled

    def turned(self, x, *rest, **more):
        return mx.contiguous(CALL(self, x, *rest, **more).swapaxes(1, 2)).swapaxes(1, 2)

    monkeypatch.setattr(mx, "compile", noting)
    monkeypatch.setattr(llama.TransformerBlock, "__call__", turned)
    assert both() == (2, [])
    assert laid_out
    assert all(laid_out)


def test_where_fused_kernels_round_otherwise_no_layer_is_traced(monkeypatch):
    monkeypatch.setattr(traces, "_rounds_alike", lambda: False)
    made, (line,) = both()
    assert made == 0
    assert "round otherwise" in line


def test_traces_that_no_step_uses_any_more_make_room(monkeypatch):
    monkeypatch.setattr("mlx_empire.engine.traces.MOST", 1)
    case = Case(**SMALL, compiled=True)
    _, trainer, _ = run(case)
    kept = trainer.streamed._passes.traces
    first = set(kept._known)
    kept.begin()
    assert set(kept._known) == first, "the last step used them"
    kept.begin()
    assert not kept._known


# ---- what layers have in common


class Layer(nn.Module):
    def __init__(self, **values: Any) -> None:
        super().__init__()
        self.weight = mx.ones((2, 2))
        for name, value in values.items():
            setattr(self, name, value)


def function(layer: Layer) -> Any:
    return function_of(layer, {(id(layer), "weight")})[0]


SHARED = object()
ALIKE = [
    ({}, {}),
    ({"scale": 0.5}, {"scale": 0.5}),
    ({"_freqs": mx.array([1.0, 2.0])}, {"_freqs": mx.array([1.0, 2.0])}),
    ({"act": nn.silu}, {"act": nn.silu}),
    ({"inner": [nn.RoPE(4)]}, {"inner": [nn.RoPE(4)]}),
    ({"args": SHARED}, {"args": SHARED}),
]
DIFFERENT = [
    ({"scale": 0.5}, {"scale": 0.25}),
    ({"scale": 1}, {"scale": True}),
    ({"_freqs": mx.array([1.0, 2.0])}, {"_freqs": mx.array([1.0, 3.0])}),
    ({"_freqs": mx.array([1, 2])}, {"_freqs": mx.array([1.0, 2.0])}),
    ({"act": nn.silu}, {"act": nn.gelu}),
    ({"act": lambda x: x}, {"act": lambda x: x}),
    ({"inner": [nn.RoPE(4)]}, {"inner": [nn.RoPE(4, base=500)]}),
    ({"inner": [nn.RoPE(4)]}, {"other": [nn.RoPE(4)]}),
    ({"args": object()}, {"args": object()}),
]


@pytest.mark.parametrize(("first", "second"), ALIKE)
def test_layers_that_differ_in_their_tensors_alone_are_one_function(first, second):
    one, other = Layer(**first), Layer(**second)
    other.weight = mx.zeros((2, 2))
    assert function(one) == function(other)


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_layers_that_differ_otherwise_are_not(first, second):
    assert function(Layer(**first)) != function(Layer(**second))


def test_tensors_of_another_shape_make_another_function():
    one, other = Layer(), Layer()
    other.weight = mx.zeros((2, 3))
    assert function(one) != function(other)


def test_who_is_present_is_asked_at_each_call():
    place = Present([0])
    layer = Layer(_present=place)
    _, present = function_of(layer, {(id(layer), "weight")})
    assert present == [place]
