"""Train a model, alone or under mpirun; then by the fallback of its recipe, where it missed its gate.

The run's story from top to bottom: what is asked for, where it runs, what is trained on what, the plan, the proof
that the model can be streamed, the weights, the steps, the result. Every rank runs all of it; rank 0 also talks to
the user and writes the run's folder.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_empire import progress
from mlx_empire.cluster.hostfile import Node
from mlx_empire.cluster.machine import computes_on_gpu
from mlx_empire.comm.connect import connect
from mlx_empire.comm.failure import arm_faults, guard, together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.data.splits import Splits
from mlx_empire.model.attention.fused import refuse_too_short
from mlx_empire.model.target import Target
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.page.saved import try_report
from mlx_empire.plan.node_kernels import kernels_differ
from mlx_empire.plan.resolve import keeps_products
from mlx_empire.plan.shares import RunPlan
from mlx_empire.plan.wired_limit import fitting_plan
from mlx_empire.recipe.idle import refuse_unmeasured, without_effect
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.run import RunReport
from mlx_empire.run import result
from mlx_empire.run.agree import (
    Safeguards,
    agree_on_model,
    greet,
    make_reader,
    share_config,
    share_evaluator,
    share_nodes,
    share_recipe,
    share_target,
    standing,
)
from mlx_empire.run.apart import refuse_mixed, refuse_recipe
from mlx_empire.run.caffeinate import keep_awake
from mlx_empire.run.disks import require_disks
from mlx_empire.run.fallback import fallback_due, fallback_taken, refuse_fallback
from mlx_empire.run.folder import refuse_finished, refuse_other_scorers, refuse_unwritable, write_plan
from mlx_empire.run.job import Job
from mlx_empire.run.parent import Parent, beside_plan, lineage_of, share_parent
from mlx_empire.run.proof import share_proof
from mlx_empire.run.resume import Start, open_saver, where_to_begin
from mlx_empire.run.shared_rows import share_data
from mlx_empire.run.sources import sources_told
from mlx_empire.run.stop import StopRequest
from mlx_empire.run.teacher import Lesson, share_lesson, teacher_values
from mlx_empire.run.trainer import explaining_memory, limit_memory, load_state, make_trainer
from mlx_empire.run.what_next import next_commands
from mlx_empire.train.loop import Run, train, write_result

if TYPE_CHECKING:
    from mlx_empire.evaluation.evaluator import Evaluator
    from mlx_empire.evaluation.reading import RowReader


def train_command(options: argparse.Namespace) -> int:
    """What the command line asks for; returns the exit code."""
    with guard(None):
        comm = connect()
    with guard(comm):
        arm_faults(comm.rank)
        if options.dry_run:
            # What draws reports is not part of a run.
            from mlx_empire.capacity.answer import Wanted, answer

            return answer(comm, options.recipe, options.overrides, Wanted(hosts=options.hosts))
        keep_awake()
        path: Path | None = options.recipe
        overrides: Sequence[str] = options.overrides
        while path is not None:
            path, overrides = run_recipe(comm, path, overrides, options.hosts), ()
    return 0


def run_recipe(
    comm: Communicator, recipe_path: Path, overrides: Sequence[str], hosts: Path | None
) -> Path | None:
    """The whole run on this rank; the recipe that is to be trained next, the same on every rank."""
    # ---------------------------------------------------------------- what is asked for, and where it runs
    greet(comm, recipe_path, overrides)
    recipe = share_recipe(comm, recipe_path, overrides)
    comm = connect(recipe.comm.route, recipe.comm.bucket_bytes, recipe.comm.deadline_seconds)
    with standing(comm, recipe) as guards, StopRequest() as stop:
        nodes = share_nodes(comm, recipe, hosts)
        with together(comm):
            if comm.rank == 0:
                refuse_fallback(recipe)
        if (other := share_fallback(comm, recipe)) is not None:  # the run was over before
            return other
        with together(comm):
            refuse_mixed(recipe, comm.rank, comm.hostname)
            if comm.rank == 0:
                refuse_recipe(recipe, recipe_path)
                refuse_finished(recipe.run.dir)
                refuse_unwritable(recipe.run.dir)
                result.refuse_taken(recipe)
        carry_out(comm, recipe, nodes, guards, stop)
    gc.collect()
    mx.clear_cache()
    return None if progress.launched() else share_fallback(comm, recipe)


def share_fallback(comm: Communicator, recipe: Recipe) -> Path | None:
    """What `fallback_due` says on rank 0, which tells a person too. Collective."""
    found = fallback_due(recipe) if comm.rank == 0 else None
    if found is not None:
        print(fallback_taken(recipe, found), flush=True)
    path = comm.broadcast_json(None if found is None else str(found))
    return None if path is None else Path(path)


@dataclass(frozen=True)
class Prepared:
    """What is settled before weights are loaded: what is trained and how, on what, and from where."""

    recipe: Recipe
    target: Target
    splits: Splits
    lesson: Lesson | None
    job: Job
    start: Start
    parent: Parent | None
    plan: RunPlan
    evaluator: Evaluator | None
    reader: RowReader | None
    short: list[str]  # what is told of disks

    def told(self, comm: Communicator) -> list[str]:
        """What there is to say of disks, data and keys without effect."""
        idle = without_effect(self.recipe, self.target.spec.trained_dtypes, comm.size)
        mixed = sources_told(self.recipe, self.splits.train, self.job.steps)
        return [*self.short, *self.splits.report, *mixed, *idle]

    @property
    def scorers(self) -> dict[str, str]:
        """Digests of the code that scores, by file."""
        return {} if self.evaluator is None else self.evaluator.scorer_digests


def carry_out(
    comm: Communicator, recipe: Recipe, nodes: Sequence[Node], guards: Safeguards, stop: StopRequest
) -> None:
    """The run itself, once the ranks know each other and what is asked for."""
    ready = prepare(comm, recipe, nodes, guards)
    recipe, target, plan, start = ready.recipe, ready.target, ready.plan, ready.start
    job = taught(comm, ready, nodes)

    # ---------------------------------------------------------------- the weights
    progress.reach("load")
    with together(comm):
        wired = limit_memory(plan, comm.rank, recipe.memory.wired, nodes[comm.rank])
    guards.notes += [said for said in comm.gather_json(wired) if said is not None]
    with explaining_memory(plan, comm.rank), CommThread() as thread:
        trainer = make_trainer(comm, thread, recipe, target, plan)
        sent = load_state(comm, target, trainer, start, ready.parent)
        trainer.prepare(packing=recipe.data.packing, fresh=start.found is None)
        with together(comm):
            if trainer.inputs is not None:
                trainer.inputs.open()

        # ------------------------------------------------------------ from here on something is written
        started_over = (recipe.run.dir / "metrics.jsonl").exists()
        begin_folder(comm, ready, nodes)
        with (
            RunReport(
                comm, recipe, target.spec, plan, nodes, job.steps, start.resumed, job.log_every
            ) as report,
            open_saver(comm, plan, trainer.store, start) as saver,
        ):
            stop.watch(recipe.run.dir)
            report.show_status(lambda: saver.status)
            report.messages([*guards.notes, *ready.told(comm), *start.told(started_over)])
            if recipe.report.notify is not None and not progress.launched():
                report.message("report.notify: mlx_empire.launch sends notices, and did not start this run")
            if sent:
                report.message(f"weights read by rank 0 ({comm.hostnames[0]}) and sent to the other ranks")
            asked = ready.evaluator, ready.reader
            run = Run(
                comm, recipe, plan, nodes, target, trainer, job, ready.splits, *asked, report, saver, stop
            )
            write_result(run, *train(run))
            report.messages(saver.unsaved())
    if comm.rank == 0:
        print(try_report(recipe.run.dir), *next_commands(recipe), sep="\n", flush=True)


def prepare(comm: Communicator, recipe: Recipe, nodes: Sequence[Node], guards: Safeguards) -> Prepared:
    """All that can be refused is refused here, before anything is allocated. Collective."""
    # ---------------------------------------------------------------- what is trained, on what, and for how long
    agree_on_model(comm, recipe)
    config = share_config(comm, recipe)
    target = share_target(comm, recipe, config)
    with together(comm):
        if comm.rank == 0:
            result.refuse_result(recipe, target)
    splits = share_data(comm, recipe, target.spec)
    lesson = share_lesson(comm, recipe, target.spec, splits)
    job = Job.of(recipe, splits.train)

    # ---------------------------------------------------------------- where it goes on
    taught_by = None if lesson is None else lesson.digest
    start = where_to_begin(comm, recipe, target, splits, job.steps, taught_by)
    recipe = start.recipe
    parent = share_parent(comm, recipe, target, start.origin.base) if start.found is None else None

    # ---------------------------------------------------------------- the proof that it can be streamed
    progress.reach("proof")
    target = share_proof(comm, recipe, config, target, keeps=keeps_products(recipe, nodes))

    # ---------------------------------------------------------------- the plan, before anything is allocated
    progress.reach("plan")
    with together(comm):
        refuse_unmeasured(recipe, splits.valid is not None)
        if mx.metal.is_available() and computes_on_gpu():
            refuse_too_short(recipe.data.sequence_length)
        plan = fitting_plan(recipe, target.spec, nodes, state_bytes_of(recipe.optimizer), start.noted)
    guards.notes += start.recomputes_otherwise(plan)
    odd = kernels_differ(nodes)
    if odd:
        guards.notes.append(f"GPUs or systems differ, so bits may hang on which rank computes what ({odd})")
    job = job.part(plan.work.layout.of_rank(comm.rank))
    guards.lock(recipe.run.dir)
    evaluator = share_evaluator(comm, recipe, target.spec, plan)
    with together(comm):
        if comm.rank == 0 and start.found is not None:
            refuse_other_scorers(recipe, {} if evaluator is None else evaluator.scorer_digests)
    reader = make_reader(comm, recipe, target.spec, plan, splits.valid)
    short = require_disks(comm, recipe, target, plan, nodes, job.steps, resumed=start.found is not None)
    return Prepared(recipe, target, splits, lesson, job, start, parent, plan, evaluator, reader, short)


def taught(comm: Communicator, ready: Prepared, nodes: Sequence[Node]) -> Job:
    """The run's job, with what the teacher says of the rows: asked before the weights need the memory. Collective."""
    if ready.lesson is None:
        return ready.job
    rows, goes_on = ready.splits.train, ready.start.found is not None
    values = teacher_values(comm, ready.recipe, ready.lesson, rows, nodes, thorough=goes_on)
    return replace(ready.job, teacher=values)


def begin_folder(comm: Communicator, ready: Prepared, nodes: Sequence[Node]) -> None:
    """The run's folder with its recipe and plan, by rank 0. Collective."""
    recipe, start = ready.recipe, ready.start
    with together(comm):
        if comm.rank == 0:
            lineage = lineage_of(recipe.run.dir) if ready.parent is None else ready.parent.lineage
            write_plan(
                recipe,
                ready.plan,
                nodes,
                ready.target.spec,
                ready.splits,
                ready.job.steps,
                resumed=start.found is not None,
                origin=beside_plan(start.origin.base, lineage if recipe.tuning.start else None),
                scorers=ready.scorers,
            )
