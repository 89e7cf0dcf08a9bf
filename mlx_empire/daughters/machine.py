"""One machine's daughters, trained together on one base that lies in memory once.

How many at a time is the plan's answer: as many as its ledger allows on this machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from mlx_empire.checkpoint.manifest import sampled_digest
from mlx_empire.cluster.hostfile import Node
from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.daughters.daughter import JobsOf
from mlx_empire.daughters.many import Capacity, Daughters, Tell
from mlx_empire.engine.multi_adapter import MultiAdapterSteps
from mlx_empire.errors import UserError
from mlx_empire.formats.fetched import naming_the_fetch
from mlx_empire.formats.hf_folder import open_folder
from mlx_empire.model.build import describe
from mlx_empire.model.config import read_config
from mlx_empire.model.target import Target
from mlx_empire.model.together import Present, put_together, why_alone
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.refusal import require_fit
from mlx_empire.plan.resolve import resolve
from mlx_empire.plan.shares import RunPlan
from mlx_empire.recipe.changes import variant
from mlx_empire.recipe.idle import without_effect
from mlx_empire.recipe.schema import Recipe
from mlx_empire.run.agree import share_target
from mlx_empire.run.trainer import limit_memory, load_weights, make_trainer


def capacity_for(recipe: Recipe, node: Node, most: int) -> Capacity:
    """How many daughters, `most` at most, the machine trains together. DoesNotFitError where not even one fits."""
    low, best = 1, _planned(recipe, node, 1)
    require_fit(best, [node])
    high = most + 1
    if why_alone(single_target(recipe).model) is not None:
        return Capacity(1, best)
    while high - low > 1:
        middle = (low + high) // 2
        plan = _planned(recipe, node, middle)
        if plan.fits:
            low, best = middle, plan
        else:
            high = middle
    return Capacity(low, best)


def notes_on(recipe: Recipe) -> list[str]:
    """What there is to say of keys without effect, for each daughter is one machine's, and of adapters that go one at
    a time."""
    single = single_target(recipe)
    why = why_alone(single.model)
    alone = [] if why is None else [f"tuning.targets: {why}, so daughters are trained one after another"]
    return [*without_effect(recipe, single.spec.trained_dtypes, ranks=1), *alone]


def single_target(recipe: Recipe) -> Target:
    """The base with one daughter's adapter."""
    folder = recipe.model.path
    with naming_the_fetch(recipe):
        config = read_config(folder)
    return share_target(SoloCommunicator("here"), recipe, config)


def _together(recipe: Recipe, count: int) -> tuple[Target, Present]:
    target = single_target(recipe)
    present = put_together(target.model, count)
    spec = describe(target.model, target.spec.config, target.spec.name, target.spec.dtype)
    return replace(target, spec=spec), present


def _planned(recipe: Recipe, node: Node, count: int) -> RunPlan:
    """The plan for so many daughters: their adapters, and a micro-batch with the rows of all."""
    batch = recipe.batch
    sizes = {"micro_size": batch.micro_size * count, "global_size": batch.global_size * count, "cells": 1}
    several = recipe.model_copy(
        update={
            "batch": batch.model_copy(update=sizes),
            "memory": recipe.memory.model_copy(update={"zero_stage": 2, "shares": "equal"}),
        }
    )
    target, _ = _together(recipe, count)
    return resolve(several, target.spec, [node], state_bytes_of(recipe.optimizer))


def train_adapters(
    recipe: Recipe,
    jobs: JobsOf,
    names: Sequence[str],
    node: Node,
    capacity: Capacity,
    tell: Tell,
    pauses: Mapping[str, int] = MappingProxyType({}),
) -> list[str]:
    """Train all `names`, or as far as `pauses` says by name; returns those that failed."""
    target, present = _together(recipe, capacity.places)
    comm = SoloCommunicator(node.name)
    wired = limit_memory(capacity.plan, 0, recipe.memory.wired, node)
    if wired is not None:
        print(wired)
    with CommThread() as thread:
        quiet = variant(recipe, {"optimizer.statistics_every": None})  # they would be of no one daughter
        trainer = make_trainer(comm, thread, quiet, target, capacity.plan)
        load_weights(comm, recipe, target, trainer.store)
        trainer.prepare(packing=recipe.data.packing, together=capacity.places)
        adapters = MultiAdapterSteps(trainer, present, recipe.optimizer.clip_norm, recipe.run.seed)
        base = sampled_digest(recipe.model.path)
        many = Daughters(jobs, node, capacity, single_target(recipe), base, adapters, tell)
        return many.run(list(names), pauses)


def data_bytes(people: Path, name: str) -> int:
    """How much data a person has, by the sizes of files."""
    return sum(f.stat().st_size for f in (people / name).rglob("*") if f.is_file())


def refuse_unbuilt(recipe: Recipe) -> None:
    """UserError for what a recipe may ask of one daughter and not of many."""
    if recipe.tuning.type == "full":
        raise UserError("tuning.type: full: daughters are adapters; use lora, dora or qlora")
    if recipe.model.dtype == "float16":
        raise UserError(
            "model.dtype: float16: every daughter would need a loss scale of its own; use bfloat16"
        )
    if recipe.distillation.teacher is not None:
        raise UserError(
            f"distillation.teacher: {recipe.distillation.teacher}: only `train` asks a teacher; leave it out here"
        )
    if recipe.run.resume not in ("auto", "never"):
        raise UserError(
            f"run.resume: {recipe.run.resume}: each daughter goes on from its own last step; use auto or never"
        )
    if recipe.model.init == "random":
        raise UserError("model.init: random: daughters build on a trained base; use pretrained")
    open_folder(recipe.model.path)
