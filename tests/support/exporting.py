"""Exports of tiny models, for tests: every unit from a source, and what mlx-lm makes of the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_empire.formats.export_folder import FolderWriter
from mlx_empire.formats.source import FolderSource, RandomSource, WeightSource
from mlx_empire.model.spec import ModelSpec
from support.tiny_models import tiny_config, tiny_model

Write = Callable[..., Path]  # the fixture `write_folder`
TOKENS = [[5, 9, 250, 17, 3, 3, 0, 88]]


def export_all(writer: FolderWriter, source: WeightSource, spec: ModelSpec) -> dict[str, mx.array]:
    """Write every unit from a source; returns the tensors as the model computes with them."""
    trained = {}
    with writer:
        for index in range(len(spec.units)):
            unit = {t.name: a for t, a in source.unit(index)}
            writer.write_unit(index, unit)
            trained |= {t.name: unit[t.name].astype(getattr(mx, t.dtype)) for t in spec.units[index].tensors}
    return trained


def logits(model: nn.Module) -> mx.array:
    return model(mx.array(TOKENS))


def with_weights(model: nn.Module, tensors: dict[str, mx.array]) -> nn.Module:
    model.update(tree_unflatten(list(tensors.items())))
    return model.eval()


def llama_folder(write_folder: Write, name: str = "source") -> Path:
    build, spec = tiny_model("llama")
    source = RandomSource(build, spec, seed=4)
    tensors = {t.name: a for i in range(len(spec.units)) for t, a in source.unit(i)}
    return write_folder(tiny_config("llama"), tensors, name=name)


def export_llama(folder: Path, out: Path) -> FolderWriter:
    build, spec = tiny_model("llama")
    writer = FolderWriter(out, spec, build, folder)
    export_all(writer, FolderSource(folder, build, spec), spec)
    return writer
