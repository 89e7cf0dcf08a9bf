"""One machine's daughters, trained together on one base that lies in memory once.

How many at a time is the plan's answer: as many as its ledger allows on this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from mlx_empire import assemble
from mlx_empire.adapters.together import Present, may_share, put_together
from mlx_empire.checkpoint.distribute import fill_from_own
from mlx_empire.checkpoint.folder import open_folder
from mlx_empire.checkpoint.identity import base_digest
from mlx_empire.checkpoint.source import FolderSource
from mlx_empire.checkpoint.tuned_source import TunedSource
from mlx_empire.cluster.hostfile import Node
from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine.cohort import Cohort
from mlx_empire.engine.trainer import Trainer
from mlx_empire.errors import UserError
from mlx_empire.model.target import Target
from mlx_empire.optim.choose import make_optimizer
from mlx_empire.plan.config import read_config
from mlx_empire.plan.describe import describe
from mlx_empire.plan.model import ModelSpec
from mlx_empire.plan.resolve import RunPlan, require_fit, resolve
from mlx_empire.recipe.schema import Recipe
from mlx_empire.school import Room, School, Tell


def room_for(recipe: Recipe, node: Node, most: int) -> Room:
    """How many daughters, `most` at most, the machine trains together. DoesNotFitError where not even one fits."""
    low, best = 1, _planned(recipe, node, 1)
    require_fit(best, [node])
    high = most + 1
    if not may_share(_built(recipe).model):
        return Room(1, best)
    while high - low > 1:
        middle = (low + high) // 2
        plan = _planned(recipe, node, middle)
        if plan.fits:
            low, best = middle, plan
        else:
            high = middle
    return Room(low, best)


def _built(recipe: Recipe) -> Target:
    folder = recipe.model.path
    return assemble.build(SoloCommunicator("here"), recipe, read_config(folder))


def _together(recipe: Recipe, count: int) -> tuple[Target, Present, ModelSpec]:
    built = _built(recipe)
    present = put_together(built.model, count) if may_share(built.model) else Present([0])
    return built, present, describe(built.model, built.spec.config, built.spec.name, built.spec.dtype)


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
    _, _, spec = _together(recipe, count)
    return resolve(several, spec, [node], make_optimizer(recipe.optimizer).state_bytes)


def bring_up(
    recipe: Recipe, people: Path, names: Sequence[str], node: Node, room: Room, tell: Tell
) -> list[str]:
    """Train all `names`; returns those that failed."""
    built, present, spec = _together(recipe, room.places)
    optimizer = make_optimizer(recipe.optimizer)
    mx.set_memory_limit(int(node.limit_bytes or 0))
    mx.set_cache_limit(max(int(node.limit_bytes or 0) - room.plan.ledgers[0].peak, 1 << 28))
    mx.reset_peak_memory()
    noise = recipe.run.seed if recipe.tuning.dropout else None
    comm = SoloCommunicator(node.name)
    with CommThread() as thread:
        trainer = Trainer(
            built.model, spec, room.plan.shards, room.plan.work, comm, thread, optimizer, None, noise
        )
        folder = FolderSource(recipe.model.path, built.rebuild, built.base)
        fill_from_own(trainer.store, TunedSource(folder, spec, recipe.run.seed, built.packing))
        trainer.prepare(packing=recipe.data.packing)
        cohort = Cohort(trainer, present, optimizer, recipe.optimizer.clip_norm, recipe.run.seed)
        base = base_digest(recipe.model.path)
        school = School(recipe, people, node, room, _built(recipe), base, cohort, tell)
        return school.run(list(names))


def data_bytes(people: Path, name: str) -> int:
    """How much data a person has, by the sizes of files."""
    return sum(f.stat().st_size for f in (people / name).rglob("*") if f.is_file())


def refuse_unbuilt(recipe: Recipe) -> None:
    """UserError for what a recipe may ask of one daughter and not of many."""
    if recipe.tuning.type == "full":
        raise UserError("tuning.type: full: daughters are adapters; use lora, dora or qlora")
    if recipe.optimizer.in_backward:
        raise UserError(
            "optimizer.in_backward: true: every daughter is clipped by her own norm; leave it out"
        )
    if recipe.run.resume not in ("auto", "never"):
        raise UserError(
            f"run.resume: {recipe.run.resume}: each daughter goes on from her own last step; use auto or never"
        )
    if recipe.model.init == "random":
        raise UserError("model.init: random: daughters build on a trained base; use pretrained")
    open_folder(recipe.model.path)
