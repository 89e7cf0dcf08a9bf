"""A recipe of which only the forward is run, and a model with nothing to train.

Nothing is held for gradients or states, so it needs little more than its weights, over as many machines as it takes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlx_empire.model.build import describe
from mlx_empire.model.target import Target
from mlx_empire.recipe.sections import TuningSection

ROWS = 8  # pass a rank at once
NO_TUNING = {f"tuning.{name}": field.default for name, field in TuningSection.model_fields.items()}
# What a run has besides its weights, and a forward has not.
FORWARD_ONLY: dict[str, Any] = {
    "model.init": "pretrained",
    "model.architecture": None,
    "model.source": None,
    "batch.micro_size": 1,
    "batch.cells": "auto",
    "optimizer.in_backward": False,
    "optimizer.statistics_every": None,
    "memory.gradient_checkpointing": True,
    "memory.keep_products": False,
    "memory.activation_offload": False,
    "memory.shares": "memory",
    "numerics.spikes": "off",
    "distillation.teacher": None,
}


def frozen(target: Target) -> Target:
    """The target of full tuning with nothing to train; one with adapters as it is."""
    if target.adapters is not None:
        return target
    target.model.freeze()
    spec = target.spec
    return replace(target, spec=describe(target.model, spec.config, spec.name, spec.dtype))
