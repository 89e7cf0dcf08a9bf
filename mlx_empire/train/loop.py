"""Train a model, alone or under mpirun.

The run's story from top to bottom: what is asked for, where it runs, what is trained on what, the plan, the proof
that the model can be streamed, the weights, the steps, the result. Every rank runs all of it; rank 0 also talks to
the user and writes the run's folder.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_empire import progress
from mlx_empire.checkpoint.agree import replicas_agree
from mlx_empire.checkpoint.save import Saver
from mlx_empire.cluster.hostfile import Node
from mlx_empire.cluster.machine import computes_on_gpu
from mlx_empire.comm.connect import connect
from mlx_empire.comm.failure import arm_faults, guard, together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.data.batches import validation_micro_batches
from mlx_empire.data.splits import Splits
from mlx_empire.engine.streamable import verify_scaled_down
from mlx_empire.engine.trainer import Trainer
from mlx_empire.evaluation.gate import GateKeeper, held_out_loss
from mlx_empire.model.attention.fused import refuse_too_short
from mlx_empire.model.spec import RootNames
from mlx_empire.model.target import Target
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.page.saved import try_report
from mlx_empire.plan.hardware import known_speed
from mlx_empire.plan.resolve import RunPlan, keeps_products, kernels_differ
from mlx_empire.plan.wired_limit import fitting_plan
from mlx_empire.plan.work import executed_flops
from mlx_empire.recipe.idle import without_effect
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.console import said_if_slow
from mlx_empire.report.run import RunReport
from mlx_empire.run import result
from mlx_empire.run.agree import (
    Safeguards,
    agree_on_model,
    greet,
    make_reader,
    share_config,
    share_data,
    share_evaluator,
    share_gate,
    share_nodes,
    share_recipe,
    share_target,
    standing,
)
from mlx_empire.run.caffeinate import keep_awake
from mlx_empire.run.disks import require_disks
from mlx_empire.run.folder import refuse_finished, refuse_unwritable, write_plan
from mlx_empire.run.job import Job, refuse_idle_keys
from mlx_empire.run.parent import beside_plan, lineage_of, share_parent
from mlx_empire.run.resume import open_saver, stopped, where_to_begin
from mlx_empire.run.stop import StopRequest
from mlx_empire.run.trainer import explaining_memory, go_back, limit_memory, load_state, make_trainer
from mlx_empire.run.what_next import next_commands

if TYPE_CHECKING:
    from mlx_empire.evaluation.evaluator import Evaluator
    from mlx_empire.evaluation.reading import RowReader
    from mlx_empire.report.trace import RunTrace

VERIFYING = (
    "verifying on the model scaled down that layer by layer it has the whole model's loss and gradients "
    "(slower where layers go position by position, as state-space layers do)"
)


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
        run_recipe(comm, options.recipe, options.overrides, options.hosts)
    return 0


def run_recipe(comm: Communicator, recipe_path: Path, overrides: Sequence[str], hosts: Path | None) -> None:
    """The whole run on this rank."""
    # ---------------------------------------------------------------- what is asked for, and where it runs
    greet(comm, recipe_path, overrides)
    recipe = share_recipe(comm, recipe_path, overrides)
    comm = connect(recipe.comm.route, recipe.comm.bucket_bytes, recipe.comm.deadline_seconds)
    with standing(comm, recipe) as guards, StopRequest() as stop:
        nodes = share_nodes(comm, recipe, hosts)
        with together(comm):
            if comm.rank == 0:
                refuse_finished(recipe.run.dir)
                refuse_unwritable(recipe.run.dir)
                result.refuse_taken(recipe)
        carry_out(comm, recipe, nodes, guards, stop)


def carry_out(
    comm: Communicator, recipe: Recipe, nodes: Sequence[Node], guards: Safeguards, stop: StopRequest
) -> None:
    """The run itself, once the ranks know each other and what is asked for."""
    # ---------------------------------------------------------------- what is trained, on what, and for how long
    agree_on_model(comm, recipe)
    config = share_config(comm, recipe)
    target = share_target(comm, recipe, config)
    with together(comm):
        if comm.rank == 0:
            result.refuse_result(recipe, target)
    splits = share_data(comm, recipe, target.spec)
    job = Job.of(recipe, splits.train)

    # ---------------------------------------------------------------- where it goes on
    start = where_to_begin(comm, recipe, target, splits, job.steps)
    recipe = start.recipe
    parent = share_parent(comm, recipe, target, start.origin.base) if start.found is None else None

    # ---------------------------------------------------------------- the proof that it can be streamed
    progress.reach("proof")
    shown = None
    with together(comm):
        if comm.rank == 0:
            with said_if_slow(f"{recipe.model.path}: {VERIFYING}"):
                by_pattern = recipe.numerics.attention != "mask"
                name = str(recipe.model.path)
                keeps = keeps_products(recipe, nodes)
                shown = asdict(verify_scaled_down(config, name, by_pattern=by_pattern, keeps=keeps))
    root_names = RootNames(**comm.broadcast_json(shown))
    target = replace(target, spec=replace(target.spec, root_names=root_names))

    # ---------------------------------------------------------------- the plan, before anything is allocated
    progress.reach("plan")
    with together(comm):
        refuse_idle_keys(recipe, splits)
        if mx.metal.is_available() and computes_on_gpu():
            refuse_too_short(recipe.data.sequence_length)
        plan = fitting_plan(recipe, target.spec, nodes, state_bytes_of(recipe.optimizer))
    odd = kernels_differ(nodes)
    if odd:
        guards.notes.append(f"GPUs or systems differ, so bits may hang on which rank computes what ({odd})")
    job = job.part(plan.work.layout.of_rank(comm.rank))
    guards.lock(recipe.run.dir)
    evaluator = share_evaluator(comm, recipe, target.spec, plan)
    reader = make_reader(comm, recipe, splits.valid)
    short = require_disks(comm, recipe, target, plan, nodes, job.steps, resumed=start.found is not None)

    # ---------------------------------------------------------------- the weights
    progress.reach("load")
    with together(comm):
        wired = limit_memory(plan, comm.rank, recipe.memory.wired, nodes[comm.rank])
    guards.notes += [said for said in comm.gather_json(wired) if said is not None]
    with explaining_memory(plan, comm.rank), CommThread() as thread:
        trainer = make_trainer(comm, thread, recipe, target, plan)
        sent = load_state(comm, target, trainer, start, parent)
        trainer.prepare(packing=recipe.data.packing, fresh=start.found is None)

        # ------------------------------------------------------------ from here on something is written
        started_over = (recipe.run.dir / "metrics.jsonl").exists()
        with together(comm):
            if comm.rank == 0:
                lineage = lineage_of(recipe.run.dir) if parent is None else parent.lineage
                write_plan(
                    recipe,
                    plan,
                    nodes,
                    target.spec,
                    splits,
                    job.steps,
                    resumed=start.found is not None,
                    origin=beside_plan(start.origin.base, lineage if recipe.tuning.start else None),
                )
        with (
            RunReport(
                comm, recipe, target.spec, plan, nodes, job.steps, start.resumed, job.log_every
            ) as report,
            open_saver(comm, plan, trainer.store, start) as saver,
        ):
            stop.watch(recipe.run.dir)
            report.show_status(lambda: saver.status)
            idle = without_effect(recipe, target.spec.trained_dtypes, comm.size)
            report.messages([*guards.notes, *short, *splits.report, *idle, *start.told(started_over)])
            if recipe.report.notify is not None and not progress.launched():
                report.message("report.notify: mlx_empire.launch sends notices, and did not start this run")
            if sent:
                report.message(f"weights read by rank 0 ({comm.hostnames[0]}) and sent to the other ranks")
            run = Run(
                comm,
                recipe,
                plan,
                nodes,
                target,
                trainer,
                job,
                splits,
                evaluator,
                reader,
                report,
                saver,
                stop,
            )
            write_result(run, *train(run))
            report.messages(saver.unsaved())
    if comm.rank == 0:
        print(try_report(recipe.run.dir), *next_commands(recipe), sep="\n", flush=True)


@dataclass(frozen=True)
class Run:
    """What the loop works with."""

    comm: Communicator
    recipe: Recipe
    plan: RunPlan
    nodes: Sequence[Node]
    target: Target
    trainer: Trainer
    job: Job
    splits: Splits
    evaluator: Evaluator | None
    reader: RowReader | None
    report: RunReport
    saver: Saver
    stop: StopRequest


def train(run: Run) -> tuple[int, GateKeeper]:
    """The steps that are left, with evaluation and saving in between, until they are done or the gate is reached.

    Returns the last step, and the gate.
    """
    comm, job, report, saver = run.comm, run.job, run.report, run.saver
    if job.save_every:
        saver.open()
    gate = share_gate(comm, run.recipe, job.gate)
    if job.evaluates(0) and not saver.newest:
        evaluate(run, 0, gate)
    trace = traced(run) if run.recipe.report.trace else None
    step, done, reason = saver.newest, gate.reached, None
    evaluated = saved = float(comm.broadcast_json(time.time()))  # what came before is saved, or never was
    while step < job.steps and not done and not reason:
        step += 1
        now = take_step(run, step)
        evaluated, saved = min(evaluated, now), min(saved, now)  # a clock that is set back counts from there
        done = job.ends(step)
        if trace is not None:
            report.messages(trace.step())
        if job.evaluates(step, now - evaluated):
            evaluate(run, step, gate)
            evaluated, done = now, done or gate.reached

        # ------------------------------------------------------------ what survives a crash
        reason = None if done else run.stop.agreed(comm)
        if reason or job.saves(step, now - saved, last=done):
            save(run, step)  # written while the next step computes
            saved = now
        report.messages(saver.news())
    if trace is not None:
        report.messages(trace.finish())
    saver.finish()
    report.messages(saver.news())
    if reason:
        raise stopped(saver, step, reason)
    return step, gate


def take_step(run: Run, step: int) -> float:
    """One step, and what the user sees of it; when it ended, by rank 0's clock on every rank."""
    comm, job, trainer, report = run.comm, run.job, run.trainer, run.report
    started, traffic = time.perf_counter(), comm.traffic.snapshot()
    progress.begin_step(step)
    progress.reach("data")
    taken = trainer.train_step(job.batches(step), job.targets(step), step, job.rates(step))

    seconds, moved = time.perf_counter() - started, comm.traffic.since(traffic)
    line = job.record(step, taken, seconds)
    line |= speed(run, job.positions(step), seconds)
    line["waited_for"] = {**taken.waited_for, "save": run.saver.held_up()}
    report.step(line, sum(moved.sent), sum(moved.received))
    if taken.note:
        report.message(taken.note)
        report.notify("spike", taken.note)
    if taken.go_back:
        report.message(go_back(comm, run.recipe, trainer, run.saver))
    return float(line["time"])


def traced(run: Run) -> RunTrace:
    """What notes a few steps for a trace, beside what the plan predicts of them."""
    from mlx_empire.report.trace import RunTrace, predicted_events

    predicted = partial(predicted_events, run.recipe, run.target.spec, run.nodes, run.trainer.optimizer)
    return RunTrace(run.comm, run.recipe.run.dir, run.trainer, run.saver, predicted)


def save(run: Run, step: int) -> None:
    """Begin to save the state after `step`."""
    replicas_agree(run.trainer.store, run.comm)
    run.saver.request(step, run.trainer.carried())


def speed(run: Run, positions: int, seconds: float) -> dict[str, float | None]:
    """When a step ended (seconds since 1970, by this rank's clock), executed TFLOP/s of all ranks, and what part of
    their chips' that is."""
    flops = executed_flops(run.target.spec, run.plan.work, positions, run.job.global_size)
    rate, peak = flops / seconds, known_speed(run.nodes)
    return {
        "time": time.time(),
        "executed_tflops": rate / 1e12,
        "chip_fraction": rate / peak if peak else None,
    }


def evaluate(run: Run, step: int, gate: GateKeeper) -> None:
    """Measure the held-out loss (None without a validation split) and the evaluation sets' scores; tell the gate."""
    progress.reach("evaluate")
    comm, recipe, valid = run.comm, run.recipe, run.splits.valid
    most = max(1, *(run.plan.work.micro_batches(r) for r in range(comm.size)))
    found: dict[str, Any] = {"step": step, "eval_loss": None}
    if valid is not None:
        batches = list(validation_micro_batches(valid, recipe.batch.micro_size, recipe.run.eval_batches))
        found["eval_loss"] = held_out_loss(run.trainer.streamed, comm, batches, most)
    if run.evaluator is not None:
        found["scores"] = run.evaluator.scores(run.trainer, comm, most)
    if run.reader is not None:
        readings = run.reader.read(run.trainer.streamed, comm, most)
        run.report.samples(step, readings)
    run.report.evaluation(found)
    if gate.observe(found):
        run.report.notify("gate", gate.sentence())


def write_result(run: Run, step: int, gate: GateKeeper) -> None:
    """Write `final/`, freeze it if the gate was reached, then `COMPLETE`; wait as long as a disk refuses.

    A run that waits and is asked to stop saves what is not saved yet.
    """
    comm, recipe, target, trainer, saver = run.comm, run.recipe, run.target, run.trainer, run.saver
    said: list[str] = []

    def stop_if_asked() -> None:
        if reason := run.stop.agreed(comm):
            save(run, step)
            saver.finish()
            run.report.messages(saver.news())
            raise stopped(saver, step, reason)

    def seal() -> result.Refusal | list[str]:
        return result.attempted(comm, lambda: said.extend(result.seal(recipe, gate))) or said

    patience = result.Patience(comm, result.final_of(recipe), run.report, saver, stop_if_asked)
    patience.until_written(lambda: result.write_final(recipe, target, trainer.store, comm))
    patience.until_written(seal)
