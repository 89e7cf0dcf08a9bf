"""Folders for tests of reading: weights as Hugging Face stores them, and all that a source gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from support.tiny_models import tiny_model

from mlx_empire.formats.hf_names import choose_layout
from mlx_empire.formats.source import RandomSource, WeightSource
from mlx_empire.model.spec import ModelSpec

Write = Callable[..., Path]


def all_tensors(source: WeightSource, spec: ModelSpec) -> dict[str, mx.array]:
    return {t.name: array for i in range(len(spec.units)) for t, array in source.unit(i)}


def huggingface_tensors(
    family: str, dtype: mx.Dtype = mx.float32, **overrides: object
) -> dict[str, mx.array]:
    """Random weights named and laid out as Hugging Face stores them."""
    build, spec = tiny_model(family, **overrides)
    values = all_tensors(RandomSource(build, spec, seed=3), spec)
    pieces = [p for unit in choose_layout(spec, build, None).units for p in unit]
    made = {p.name: mx.contiguous(p.make(*(values[n] for n in p.takes)).astype(dtype)) for p in pieces}
    mx.eval(made)
    return made
