"""What it costs to pack a merged model again: the loss on a run's own rows, of the adapter as it was trained and after.

A packed weight moves only by whole steps of its codes, and most of an adapter is smaller: what is left of it is not
known beforehand. Measured on one machine that holds the model, which the plan of the run says too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_empire.cluster.machine import measure_this_machine
from mlx_empire.data.batches import MicroBatch, counted, validation_micro_batches
from mlx_empire.errors import UserError
from mlx_empire.formats.hf_folder import open_folder
from mlx_empire.formats.source import FolderSource, TunedSource
from mlx_empire.model.build import compute_dtype
from mlx_empire.model.config import read_config
from mlx_empire.model.spec import ITEM_BYTES
from mlx_empire.model.target import Target, make_target
from mlx_empire.recipe.schema import Recipe
from mlx_empire.run.shared_rows import load_data
from mlx_empire.sizes import amount

MOST_ROWS = 16


@dataclass(frozen=True)
class PackingLoss:
    """Mean losses of the base, of the base with its adapter, and of the merged model after packing."""

    base: float
    adapted: float
    packed: float
    rows: int
    held_out: bool

    def sentence(self) -> str:
        """For a person."""
        gain = self.base - self.adapted
        left = f"; {(self.base - self.packed) / gain:.0%} of the adapter's gain is left" if gain > 0 else ""
        what = "held-out loss" if self.held_out else "loss on training rows"
        return (
            f"{what} of {self.rows} rows: {self.base:.4f} base, {self.adapted:.4f} with the adapter, "
            f"{self.packed:.4f} packed again{left}"
        )


def packing_loss(recipe: Recipe, base: Path, adapter: Mapping[str, mx.array], packed: Path) -> PackingLoss:
    """Measure on up to `MOST_ROWS` rows; `adapter`: by mlx-lm's names; `packed`: the folder that was written.

    UserError where the run's rows are not there any more, or this machine is too small for its model.
    """
    config, stored = read_config(base), open_folder(base).stored()
    dtype = compute_dtype(config, recipe.model.dtype)
    target = make_target(config, recipe.tuning, str(base), dtype, stored)
    size = sum(t.size * ITEM_BYTES[t.dtype] for u in target.spec.units for t in u.tensors)
    limit = measure_this_machine().limit_bytes
    if size > limit:
        raise UserError(f"{base}: {amount(size)} of weights do not fit in this machine's {amount(limit)}")
    splits = load_data(recipe, target.spec)
    batches = list(validation_micro_batches(splits.valid or splits.train, 1, MOST_ROWS))
    tuned = _loaded(target, base, recipe.run.seed)
    before = _mean_loss(tuned, batches)
    tuned.load_weights(list(adapter.items()), strict=False)
    after = _mean_loss(tuned, batches)
    del tuned, target
    mx.clear_cache()
    from mlx_lm.utils import load_model  # imports transformers

    again, _ = load_model(packed)
    return PackingLoss(before, after, _mean_loss(again, batches), len(batches), splits.valid is not None)


def _loaded(target: Target, base: Path, seed: int) -> nn.Module:
    """The run's model with its first weights: fresh adapters add nothing."""
    source = TunedSource(FolderSource(base, target.rebuild, target.base), target.spec, seed, target.packing)
    for index in range(len(target.spec.units)):
        target.model.load_weights([(t.name, a) for t, a in source.unit(index)], strict=False)
    return target.model


def _mean_loss(model: nn.Module, batches: Sequence[MicroBatch]) -> float:
    """Mean cross-entropy per counted token, by mlx-lm's own forward pass."""
    model.eval()
    losses: list[float] = []
    for batch in batches:
        logits = model(mx.array(batch.inputs)).astype(mx.float32)
        each = nn.losses.cross_entropy(logits, mx.array(batch.targets)) * mx.array(batch.mask)
        losses.append(float(np.array(mx.sum(each))))
    return math.fsum(losses) / max(sum(map(counted, batches)), 1)
