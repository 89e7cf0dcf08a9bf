"""The trainer that a recipe asks for: how its keys become the settings of a step, and what MLX may keep of memory."""

from __future__ import annotations

import mlx.core as mx

from mlx_empire.comm.protocol import Communicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine.numerics import SpikeWatch
from mlx_empire.engine.trainer import Trainer, TrainerSettings
from mlx_empire.model.target import Target
from mlx_empire.optim.choose import make_optimizer
from mlx_empire.plan.resolve import RunPlan
from mlx_empire.recipe.schema import Recipe


def make_trainer(
    comm: Communicator, thread: CommThread, recipe: Recipe, target: Target, plan: RunPlan
) -> Trainer:
    """A rank's trainer, without weights: they are loaded next, and `Trainer.prepare` ends it."""
    optimizer, settings = make_optimizer(recipe.optimizer), trainer_settings(recipe)
    return Trainer(target.model, target.spec, plan.shards, plan.work, comm, thread, optimizer, settings)


def trainer_settings(recipe: Recipe) -> TrainerSettings:
    """What the recipe chooses of a step; for one trainer."""
    optimizer, numerics = recipe.optimizer, recipe.numerics
    return TrainerSettings(
        clip_norm=optimizer.clip_norm,
        noise_seed=recipe.run.seed if recipe.tuning.dropout else None,
        spikes=SpikeWatch(numerics.spikes, numerics.threshold, numerics.window, numerics.max_skips),
        statistics_every=optimizer.statistics_every,
    )


def limit_memory(plan: RunPlan, rank: int) -> None:
    """Hold MLX to the node's limit: freed buffers are kept for reuse only in what the plan leaves over."""
    limit, peak = plan.limits[rank], plan.ledgers[rank].peak
    mx.set_memory_limit(limit)
    mx.set_cache_limit(max(limit - peak, 1 << 28))
    mx.reset_peak_memory()
