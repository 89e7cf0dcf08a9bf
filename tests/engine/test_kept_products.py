"""What is kept of recomputed layers changes no bit, and the backward computes exactly that less.

What a step gives that keeps nothing is held against whole models and the oracle elsewhere.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear
from oracle.settings import SETTINGS
from support.mpi import run_ranks
from support.stepping import Case, weights_of

from mlx_empire.model.attention.patterns import Pattern
from mlx_empire.model.attention.segments import Kernels, attending
from mlx_empire.model.kept import ATTENTION, Kept, Noting, Reusing, calling

DAILY = (
    "llama stage 0 tail 1 cells 6",
    "gemma2 stage 3 tail 0 cells 4",
    "qwen3_moe stage 2 lora",
    "llama stage 2 qlora",
)
LONG = {"width": 600, "by_pattern": True, "packed": True, "micro_batches": 2, "cells": 2}
PATTERNED = ("llama stage 3 tail 0 cells 4", "gpt_oss stage 3 tail 0")
LAUNCHES = [
    pytest.param(1, (0, 1), {}, DAILY, id="1 daily"),
    pytest.param(2, (0, 0.4), {}, DAILY, id="2 daily"),
    pytest.param(1, (0, 0.1, 1), LONG, PATTERNED, id="1 long rows", marks=pytest.mark.slow),
    *(
        pytest.param(ranks, (0, 0.4, 1), {}, tuple(SETTINGS), id=f"{ranks} all", marks=pytest.mark.slow)
        for ranks in (1, 2, 3)
    ),
]


@cache
def bits(ranks: int, words: tuple[str, ...]) -> dict[str, list[Any]]:
    """By setting what the step gives that keeps nothing, and those that keep a part."""
    found: dict[str, list[Any]] = run_ranks(ranks, "tests/engine/kept_worker.py", list(words), timeout=1800)[
        0
    ]
    return found


@pytest.mark.parametrize(("ranks", "parts", "more", "names"), LAUNCHES)
def test_what_is_kept_changes_no_bit(ranks, parts, more, names):
    found = bits(ranks, tuple(json.dumps(word) for word in (parts, more, names)))
    assert found.keys() == set(names)
    for name, (nothing, *kept) in found.items():
        assert all(one == nothing for one in kept), name


# ---- one layer, without the engine

PRODUCTS = ("Matmul", "AddMM", "GatherMM", "QuantizedMatmul", "GatherQMM", "SegmentedMM")


def counted(arrays: list[mx.array]) -> Counter[str]:
    """How many products the graph of these arrays has, by MLX's own drawing of it."""
    drawing = io.StringIO()
    mx.export_to_dot(drawing, *arrays)
    return Counter(name for name in re.findall(r'label ="(\w+)"', drawing.getvalue()) if name in PRODUCTS)


def layer_of(family: str, kind: str) -> nn.Module:
    """The first layer of a tiny model: plain, quantised or with an adapter on a quantised matrix."""
    model, _, _ = weights_of(Case(family=family))
    layer = model.layers[0]
    if kind != "full":
        nn.quantize(
            layer,
            32,
            4,
            class_predicate=lambda _, m: (
                "weight" in m and m.weight.shape[-1] % 32 == 0 and hasattr(m, "to_quantized")
            ),
        )
        layer.freeze()
        layer.self_attn.q_proj = LoRALinear.from_base(layer.self_attn.q_proj, r=4)
        layer.self_attn.q_proj.lora_b = mx.ones_like(layer.self_attn.q_proj.lora_b)
    return layer


def gradients_of(layer: nn.Module, x: mx.array, calls: Noting | Reusing, kernels: Kernels) -> list[mx.array]:
    """The layer's vjp by what trains and by its input, lazily."""
    names, arrays = zip(*tree_flatten(layer.trainable_parameters()), strict=True)

    def run(x: mx.array, *given: mx.array) -> mx.array:
        layer.load_weights(list(zip(names, given, strict=True)), strict=False)
        with calling(calls.product), attending(Pattern(), kernels):
            output = layer(x, mask="causal")
        return output[0] if isinstance(output, tuple) else output

    _, found = mx.vjp(run, [x, *arrays], [mx.ones_like(x)])
    layer.load_weights(list(zip(names, arrays, strict=True)), strict=False)
    return list(found)


@pytest.mark.parametrize(
    ("family", "kind", "kept", "less"),
    [
        ("llama", "full", (0,), {"Matmul": 1}),
        ("llama", "full", (1, 2, 4, 5), {"Matmul": 4}),
        ("llama", "qlora", (0, 4, 5), {"QuantizedMatmul": 3}),
        ("qwen3_moe", "full", (4, 5, 6), {"Matmul": 1, "GatherMM": 2}),
        ("qwen3_moe", "qlora", (5, 6), {"GatherQMM": 2}),
        ("gemma", "full", (3, 4), {"Matmul": 2}),
        # Rows of 40 in one block, which is two products; at these the layer has the output and log-sum-exp.
        ("llama", "full", (ATTENTION,), {"AddMM": 1, "Matmul": 1}),
    ],
)
def test_the_backward_computes_the_kept_products_less_and_gives_the_same(family, kind, kept, less):
    layer = layer_of(family, kind)
    mx.random.seed(3)
    x = mx.random.normal((2, 40, 64))
    noting = Noting(kept)
    kernels = Kernels(short=0, in_blocks=noting.attention)
    with calling(noting.product), attending(Pattern(), kernels):
        mx.eval(layer(x, mask="causal"), noting.kept.arrays())
    plain, reusing = (Reusing(one) for one in (Kept(), noting.kept))
    without = gradients_of(layer, x, plain, Kernels(short=0, in_blocks=plain.attention))
    with_kept = gradients_of(layer, x, reusing, Kernels(short=0, in_blocks=reusing.attention))
    assert counted(without) - counted(with_kept) == Counter(less)
    assert not counted(with_kept) - counted(without)
    assert all(mx.array_equal(a, b) for a, b in zip(without, with_kept, strict=True))
