"""The audit's runs, in pairs on the recipe's data: everything in float32, against each technique that the recipe turns
on. The model is the recipe's scaled down, or the model itself where it is small (--own).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from mlx_empire.cluster.hostfile import Node
from mlx_empire.cluster.match import find_hostfile
from mlx_empire.comm.buffers import host_view
from mlx_empire.comm.connect import connect
from mlx_empire.comm.failure import guard, together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.data.batches import PADDING_DOCUMENT, MicroBatch, validation_micro_batches
from mlx_empire.data.files import files_there
from mlx_empire.data.splits import Splits
from mlx_empire.engine.store import ShardStore
from mlx_empire.engine.trainer import Trainer
from mlx_empire.errors import UserError, on_all_ranks
from mlx_empire.evaluation.gate import held_out_loss
from mlx_empire.model.quantize import unpacked
from mlx_empire.model.scaled_down import scaled_down_config
from mlx_empire.model.spec import ModelSpec
from mlx_empire.model.target import Target, in_dtype
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.assess import assess
from mlx_empire.plan.resolve import resolve
from mlx_empire.plan.shares import RunPlan
from mlx_empire.recipe.changes import variant
from mlx_empire.recipe.duration import Duration
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.html import refuse_unwritable_files, write_file
from mlx_empire.run.agree import share_config, share_nodes, share_recipe, share_target
from mlx_empire.run.caffeinate import keep_awake
from mlx_empire.run.job import Job
from mlx_empire.run.shared_rows import share_data
from mlx_empire.run.trainer import load_weights, make_trainer
from mlx_empire.verify.fidelity import NOISE_FLOOR, PLAIN, Finding, Outcome, Pair, audit, pairs_of
from mlx_empire.verify.page import HEAD, FidelityReport, fidelity_document, fidelity_page, rows

EVALUATED = 16  # micro-batches of validation data
RATE = 1e-3  # the small model starts at random, and learns at a rate of its own


def audit_command(options: argparse.Namespace) -> int:
    """What the command line asks for; returns the exit code."""
    with guard(None):
        comm = connect()
    with guard(comm):
        keep_awake()
        recipe = share_recipe(comm, options.recipe, options.overrides)
        with together(comm):
            if comm.rank == 0:
                hosts = find_hostfile(recipe.run.hosts, options.hosts)
                sources = [options.recipe, hosts, *files_there(recipe.data.paths)]
                refuse_unwritable_files({"--json": options.json, "--html": options.html}, sources)
        found = verify(comm, recipe, options.hosts, options.own, options.steps, options.seeds)
        with together(comm):
            if comm.rank == 0:
                show(found)
                if options.json is not None:
                    write_file("--json", options.json, json.dumps(fidelity_document(found), indent=1) + "\n")
                if options.html is not None:
                    write_file("--html", options.html, fidelity_page(found) + "\n")
        return 1 if found.failed else 0
    raise AssertionError("guard always leaves")


def verify(
    comm: Communicator, recipe: Recipe, hosts: Path | None, own: bool, steps: int, seeds: int
) -> FidelityReport:
    """The audit; collective."""
    if recipe.distillation.teacher is not None:
        raise on_all_ranks(
            UserError("distillation.teacher: the audit asks no teacher; add distillation.teacher=null")
        )
    nodes = share_nodes(comm, recipe, hosts)
    config = share_config(comm, recipe)
    original = share_target(comm, recipe, config)
    splits = share_data(comm, recipe, original.spec)
    with together(comm):
        plan = resolve(recipe, original.spec, nodes, state_bytes_of(recipe.optimizer))
    pairs = pairs_of(recipe, plan, original.spec.dtype)
    fixed = variant(recipe, {"batch.cells": plan.work.layout.cells, **plain_run(steps)})
    if not own:
        config = small_config(config)
        fixed = variant(fixed, {"model.init": "random", "optimizer.learning_rate": RATE})

    def run(asked: Recipe, moved: bool) -> Outcome:
        return train_once(comm, asked, config, nodes, splits, moved)

    def tell(text: str) -> None:
        if comm.rank == 0:
            print(text, file=sys.stderr, flush=True)

    findings = audit(fixed, pairs, [recipe.run.seed + i for i in range(seeds)], run, tell)
    if recipe.data.packing:
        tell("packing")
        findings.insert(-1, packing(comm, variant(fixed, PLAIN), config, nodes, splits))
    who = "the model itself" if own else "the model scaled down"
    judged = "held-out loss" if splits.valid is not None else "loss of the last quarter"
    on = "1 rank" if comm.size == 1 else f"{comm.size} ranks"
    paired = "1 seed" if seeds == 1 else f"{seeds} paired seeds"
    what = f"{who}, {steps:,} steps, {paired}, {on}; differences of the {judged}"
    saved = saved_bytes(recipe, original.spec, nodes, pairs)
    return FidelityReport(str(recipe.model.path), what, findings, saved)


def plain_run(steps: int) -> dict[str, Any]:
    """What all runs of the audit have in place of the recipe's: as many steps, a rate that falls, no other watch."""
    return {
        "run.steps": Duration(steps),
        "schedule.type": "cosine",
        "schedule.warmup": Duration(max(steps // 10, 1)),
        "schedule.final": 0.1,
        "numerics.spikes": "off",
        "optimizer.statistics_every": None,
    }


def small_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The scaled-down configuration, with the model's own vocabulary: the data is tokenised for it."""
    return unpacked(scaled_down_config(config, whole_vocabulary=True))


def target_and_plan(
    comm: Communicator, recipe: Recipe, config: Mapping[str, Any], nodes: Sequence[Node]
) -> tuple[Target, RunPlan]:
    """The model of `config` that a run trains, and the plan for it; collective."""
    target = share_target(comm, recipe, config)
    return target, resolve(recipe, target.spec, nodes, state_bytes_of(recipe.optimizer))


def train_once(
    comm: Communicator,
    recipe: Recipe,
    config: Mapping[str, Any],
    nodes: Sequence[Node],
    splits: Splits,
    moved: bool,
) -> Outcome:
    """One run of `recipe` on a model of `config`; collective. `moved`: from a start that differs by 1e-6."""
    target, plan = target_and_plan(comm, recipe, config, nodes)
    job = Job.of(recipe, splits.train).part(plan.work.layout.of_rank(comm.rank))
    with CommThread() as thread:
        trainer = make_trainer(comm, thread, recipe, target, plan)
        start = variant(recipe, {"run.seed": 0})  # all seeds from one start; they order the data
        load_weights(comm, start, target, trainer.store)
        if moved:
            move(trainer.store)
        trainer.prepare(packing=recipe.data.packing)
        losses = []
        for step in range(1, job.steps + 1):
            taken = trainer.train_step(
                job.batches(step), job.targets(step), step, job.rates(step), job.strength(step)
            )
            losses.append(taken.loss)
        return Outcome(tuple(losses), held_out(comm, recipe, plan, trainer, splits), digest(trainer.store))


def packing(
    comm: Communicator, recipe: Recipe, config: Mapping[str, Any], nodes: Sequence[Node], splits: Splits
) -> Finding:
    """The loss of some packed rows beside that of their documents one by one, by the same weights; collective."""
    target, plan = target_and_plan(comm, recipe, config, nodes)
    packed = list(validation_micro_batches(splits.train, 1, EVALUATED))
    alone = [one for batch in packed for one in documents_of(batch)]
    with CommThread() as thread:
        trainer = make_trainer(comm, thread, recipe, target, plan)
        load_weights(comm, recipe, target, trainer.store)
        trainer.prepare(packing=True)
        both = [held_out_loss(trainer.streamed, comm, batches, 1) for batches in (alone, packed)]
    name = f"packing, {len(alone)} documents in {len(packed)} rows"
    return Finding(Pair(name, {}, False), *((Outcome((), loss, str(i)),) for i, loss in enumerate(both)))


def documents_of(batch: MicroBatch) -> list[MicroBatch]:
    """The documents of a packed row, each as a row of its own."""
    assert batch.documents is not None
    found = []
    for number in sorted(set(batch.documents[0].tolist()) - {PADDING_DOCUMENT}):
        (place,) = np.nonzero(batch.documents[0] == number)
        inputs, targets, mask = (a[:, place] for a in (batch.inputs, batch.targets, batch.mask))
        found.append(MicroBatch(inputs, targets, mask, None, batch.rows_read))
    return found


def held_out(
    comm: Communicator, recipe: Recipe, plan: RunPlan, trainer: Trainer, splits: Splits
) -> float | None:
    """The held-out loss on a fixed sample."""
    if splits.valid is None:
        return None
    batches = list(validation_micro_batches(splits.valid, recipe.batch.micro_size, EVALUATED))
    most = max(plan.work.micro_batches(r) for r in range(comm.size))
    return held_out_loss(trainer.streamed, comm, batches, max(most, 1))


def move(store: ShardStore) -> None:
    """Scale every trained weight by 1 + 1e-6; collective."""
    for unit in store.plan.units:
        for segment, chunks in zip(unit.segments, store.chunks[unit.index], strict=True):
            for chunk in chunks if segment.kind != "frozen" else ():
                chunk.weights = (chunk.weights.astype(mx.float32) * (1 + 1e-6)).astype(chunk.weights.dtype)
                mx.eval(chunk.weights)
        if store.keeps_whole:
            store.refresh(unit.index)
            store.adopt_views(unit.index)


def digest(store: ShardStore) -> str:
    """SHA-256 of all weights as they compute; collective."""
    sha = hashlib.sha256()
    for unit in store.plan.units:
        store.bind(unit.index)
        for name, array in sorted(store.tensors(unit.index).items()):
            sha.update(name.encode())
            sha.update(host_view(mx.contiguous(array)).tobytes())
        store.free(unit.index)
    return sha.hexdigest()


def saved_bytes(
    recipe: Recipe, spec: ModelSpec, nodes: Sequence[Node], pairs: Sequence[Pair]
) -> dict[str, int | None]:
    """What each technique takes off the largest peak of the recipe's own model on its nodes, by the ledger."""

    def peak(changes: Mapping[str, Any]) -> int:
        asked = variant(recipe, {**PLAIN, **changes})
        found = assess(asked, in_dtype(spec, str(asked.model.dtype)), nodes, state_bytes_of)
        return max(node.peak_bytes for node in found.nodes)

    return {p.name: None if p.name == NOISE_FLOOR else peak(p.against) - peak(p.changes) for p in pairs}


def show(found: FidelityReport) -> None:
    """The table on the terminal."""
    made = Table(title=f"{found.model}: {found.what}", title_justify="left")
    for i, name in enumerate(HEAD):
        made.add_column(name, justify="right" if i > 2 else "left")
    for row in rows(found):
        made.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 150).print(made)
