"""Decides which optimizer a recipe asks for, and the learning rate of each step.

The rate is linear warmup, then constant, cosine or linear decay.

Steps count from 1. With W warmup steps and T steps in all, let P = max(W, 1) be the step of the peak:

- step s <= W gets base * s / W: step 1 already learns (base / W) and step W has the whole base rate;
- without warmup, step 1 has the whole base rate;
- from step P on, progress p = (s - P) / (T + 1 - P): 0 at the peak, 1 at step T + 1, the first that is not
  taken. So step T gets a little more than the final rate and no step is spent at rate zero;
- constant: base; linear: base * (1 - (1 - final) p);
  cosine: base * (final + (1 - final) (1 + cos(pi p)) / 2).

Steps after T get the final rate (of a constant schedule: base). A warmup longer than the run ends with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mlx_empire.optim.adamw import AdamW
from mlx_empire.optim.flat import FlatOptimizer
from mlx_empire.optim.momentum import Lion, Sgd
from mlx_empire.optim.protocol import StateCost
from mlx_empire.recipe.update_sections import OptimizerSection


@dataclass(frozen=True)
class LearningRate:
    """A schedule as a function: `LearningRate("cosine", 1e-5, 30, 1000)(step)`.

    `base` > 0; `warmup_steps` and `total_steps` >= 0; `final`: the fraction of `base` that is left, 0 to 1.
    """

    type: Literal["constant", "cosine", "linear"]
    base: float
    warmup_steps: int
    total_steps: int
    final: float = 0.0

    def __post_init__(self) -> None:
        assert self.type in ("constant", "cosine", "linear")
        assert self.warmup_steps >= 0
        assert self.total_steps >= 0
        assert 0 <= self.final <= 1

    def __call__(self, step: int) -> float:
        """The rate of `step`, which counts from 1."""
        assert step >= 1
        if step < self.warmup_steps:
            return self.base * step / self.warmup_steps
        peak = max(self.warmup_steps, 1)
        progress = min((step - peak) / (max(self.total_steps, peak) + 1 - peak), 1.0)
        if self.type == "constant":
            return self.base
        if self.type == "linear":
            return self.base * (1 - (1 - self.final) * progress)
        return self.base * (self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2)


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
