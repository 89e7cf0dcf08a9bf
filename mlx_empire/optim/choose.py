"""Decides which optimizer a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable

from mlx_empire.optim.adamw import AdamW
from mlx_empire.optim.flat import FlatOptimizer
from mlx_empire.optim.momentum import Lion, Sgd
from mlx_empire.optim.updating import StateCost
from mlx_empire.recipe.sections import OptimizerSection


def state_bytes_of(section: OptimizerSection) -> Callable[..., StateCost]:
    """What the optimizer of a recipe's section answers a plan that asks for the bytes of its state."""
    return make_optimizer(section).state_bytes


def make_optimizer(section: OptimizerSection) -> FlatOptimizer:
    """The optimizer of a recipe's section; `sgd` takes its momentum from the first of the betas."""
    common = (section.weight_decay, section.state_bits, section.master_weights)
    if section.name == "lion":
        return Lion(section.betas, *common)
    if section.name == "sgd":
        return Sgd(section.betas[0], *common)
    return AdamW(section.betas, section.eps, *common)
