"""One machine's daughters, trained together on one base that lies in memory once.

How many at a time is the plan's answer: as many as its ledger allows on this machine. Whoever is done leaves her place
to the next. A daughter whose data cannot be used, or whose loss is no longer finite, fails alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from mlx_empire import assemble
from mlx_empire.adapters.together import Present, may_share, put_together
from mlx_empire.checkpoint.adapter_folder import AdapterWriter
from mlx_empire.checkpoint.distribute import fill_from_own
from mlx_empire.checkpoint.folder import open_folder
from mlx_empire.checkpoint.source import FolderSource
from mlx_empire.checkpoint.staging import remove
from mlx_empire.checkpoint.tuned_source import TunedSource
from mlx_empire.cluster.hostfile import Node
from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.data.batches import micro_batch, valid_tokens, validation_micro_batches
from mlx_empire.data.splits import Splits
from mlx_empire.engine.cohort import Cohort, Lesson, Turn
from mlx_empire.engine.trainer import Trainer
from mlx_empire.errors import EmpireError, UserError
from mlx_empire.optim.choose import make_optimizer
from mlx_empire.optim.schedule import LearningRate
from mlx_empire.plan.describe import describe, read_config
from mlx_empire.plan.model import ModelSpec
from mlx_empire.plan.resolve import RunPlan, require_fit, resolve
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.folder import write_plan, write_private
from mlx_empire.report.metrics import MetricsWriter
from mlx_empire.supervise.people import DONE, FAILED, TRAINING, recipe_for

OWN_FILES = ("recipe.yaml", "plan.json", "metrics.jsonl", "metrics.tmp", "final", ".final.partial", "LOCK")

Tell = Callable[..., None]  # tell(name, **fields)


@dataclass(frozen=True)
class Room:
    """What a machine holds at a time: the model for `places` daughters and the plan for them."""

    places: int
    plan: RunPlan


@dataclass
class Pupil:
    """A daughter in a place."""

    name: str
    recipe: Recipe
    splits: Splits
    steps: int
    every: int
    rates: LearningRate
    metrics: MetricsWriter
    step: int = 0
    started: float = field(default_factory=time.perf_counter)


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


def _built(recipe: Recipe) -> assemble.Built:
    folder = recipe.model.path
    return assemble.build(SoloCommunicator("here"), recipe, read_config(folder))


def _together(recipe: Recipe, count: int) -> tuple[assemble.Built, Present, ModelSpec]:
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
        school = _School(recipe, people, node, room, _built(recipe), cohort, tell)
        return school.run(list(names))


class _School:
    """The places and who is in them."""

    def __init__(
        self,
        recipe: Recipe,
        people: Path,
        node: Node,
        room: Room,
        single: assemble.Built,
        cohort: Cohort,
        tell: Tell,
    ) -> None:
        self._recipe, self._people, self._node, self._room = recipe, people, node, room
        self._single, self._cohort, self._tell = single, cohort, tell
        self._pupils: dict[int, Pupil] = {}
        self._failed: list[str] = []

    def run(self, waiting: list[str]) -> list[str]:
        """Until nobody waits and every place is empty."""
        while waiting or self._pupils:
            for place in range(self._room.places):
                while place not in self._pupils and waiting:
                    self._admit(place, waiting.pop(0))
            if self._pupils:
                self._step()
        return self._failed

    def _admit(self, place: int, name: str) -> None:
        recipe = recipe_for(self._recipe, self._people, name)
        try:
            _clear(recipe.run.dir)
            splits = assemble.load_data(recipe, self._single.spec)
            write_plan(recipe, self._room.plan, [self._node], self._single.spec, splits)
            epochs = len(splits.train) / recipe.batch.global_size
            tokens = max(round(splits.train.tokens_per_epoch / epochs), 1)
            steps = recipe.run.steps.to_steps(None, tokens, epochs)
            every = recipe.run.eval_every.to_steps(steps, tokens, epochs) if recipe.run.eval_every else 0
            rates = assemble.learning_rate_of(recipe, steps, tokens, epochs)
        except (EmpireError, OSError) as error:
            self._fail(name, str(error))
            return
        self._cohort.begin(place)
        pupil = Pupil(name, recipe, splits, steps, every, rates, MetricsWriter(recipe.run.dir))
        self._pupils[place] = pupil
        self._tell(name, state=TRAINING, machine=self._node.name, step=0, steps=steps)
        self._evaluate(place, pupil)

    def _step(self) -> None:
        began = time.perf_counter()
        turns = {place: self._turn(pupil) for place, pupil in self._pupils.items()}
        lessons = self._cohort.step(turns)
        seconds = time.perf_counter() - began
        for place, lesson in lessons.items():
            pupil = self._pupils[place]
            pupil.step += 1
            if not math.isfinite(lesson.norm):
                pupil.metrics.close()
                del self._pupils[place]
                self._fail(pupil.name, f"step {pupil.step}: her gradient is not finite; look at her data")
                continue
            turn = turns[place]
            self._record(pupil, turn, lesson, seconds)
            if pupil.step == pupil.steps or (pupil.every and pupil.step % pupil.every == 0):
                self._evaluate(place, pupil)
            if pupil.step == pupil.steps:
                self._graduate(place, pupil)

    def _turn(self, pupil: Pupil) -> Turn:
        batch, data, seed = pupil.recipe.batch, pupil.splits.train, pupil.recipe.run.seed
        sizes = {"global_size": batch.global_size, "micro_size": batch.micro_size}
        count = batch.global_size // batch.micro_size
        batches = [micro_batch(data, seed, pupil.step, j, **sizes) for j in range(count)]
        tokens = valid_tokens(data, seed, pupil.step, global_size=batch.global_size)
        return Turn(batches, tokens, pupil.step + 1, pupil.rates(pupil.step + 1))

    def _record(self, pupil: Pupil, turn: Turn, lesson: Lesson, seconds: float) -> None:
        pupil.metrics.write(
            {
                "step": pupil.step,
                "loss": lesson.loss,
                "learning_rate": turn.learning_rate,
                "grad_norm": lesson.norm,
                "tokens": turn.tokens,
                "tokens_per_second": turn.tokens / seconds,
                "step_seconds": seconds,
                "comm_wait_seconds": 0.0,
                "together": len(self._pupils),
                "peak_bytes": [mx.get_peak_memory()],
                "predicted_peak_bytes": [self._room.plan.ledgers[0].peak],
                "bytes_sent": [0],
                "bytes_received": [0],
            }
        )
        self._tell(pupil.name, step=pupil.step)

    def _evaluate(self, place: int, pupil: Pupil) -> None:
        if pupil.splits.valid is None:
            return
        run = pupil.recipe.run
        batches = list(
            validation_micro_batches(pupil.splits.valid, pupil.recipe.batch.micro_size, run.eval_batches)
        )
        loss = self._cohort.held_out(place, batches, 1)
        pupil.metrics.write({"step": pupil.step, "eval_loss": loss})
        self._tell(pupil.name, held_out=loss, **({"before": loss} if pupil.step == 0 else {}))

    def _graduate(self, place: int, pupil: Pupil) -> None:
        """Write her result, and leave the place."""
        pupil.metrics.close()
        del self._pupils[place]
        writer = assemble.result_writer(pupil.recipe, self._single)
        assert isinstance(writer, AdapterWriter)
        adapter = self._cohort.adapter(place)
        for index, unit in enumerate(self._single.spec.units):
            writer.write_unit(index, {t.name: adapter[t.name] for t in unit.tensors if t.trainable})
        try:
            writer.close()
        except UserError as error:
            self._fail(pupil.name, str(error))
            return
        write_private(pupil.recipe.run.dir / "COMPLETE", "")
        self._tell(pupil.name, state=DONE, step=pupil.step)

    def _fail(self, name: str, why: str) -> None:
        self._failed.append(name)
        self._tell(name, state=FAILED, machine=self._node.name, note=why)


def _clear(folder: Path) -> None:
    """What an interrupted run left of a daughter goes: she begins anew. UserError where others have files there."""
    if not folder.exists():
        return
    for path in folder.iterdir():
        if path.name not in OWN_FILES:
            raise UserError(f"{path}: mlx_empire did not write this; move it away")
    for path in folder.iterdir():
        remove(path)


def data_bytes(people: Path, name: str) -> int:
    """How much data a person has, by the sizes of files."""
    return sum(f.stat().st_size for f in (people / name).rglob("*") if f.is_file())


def refuse_unbuilt(recipe: Recipe) -> None:
    """UserError for what a recipe may ask of one daughter and not of many."""
    if recipe.tuning.type == "full":
        raise UserError("tuning.type: full: daughters are adapters; use lora, dora or qlora")
    if recipe.evaluation.sets or recipe.evaluation.stop_when:
        raise UserError(
            "evaluation: daughters that are trained together have no sets and gates; leave it out"
        )
    if recipe.optimizer.in_backward:
        raise UserError(
            "optimizer.in_backward: true: every daughter is clipped by her own norm; leave it out"
        )
    if recipe.model.init == "random":
        raise UserError("model.init: random: daughters build on a trained base; use pretrained")
    open_folder(recipe.model.path)
