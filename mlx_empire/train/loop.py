"""The steps of a run, with evaluation and saving between them, and its result at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mlx_empire import progress
from mlx_empire.checkpoint.agree import replicas_agree
from mlx_empire.checkpoint.save import Saver
from mlx_empire.cluster.hostfile import Node
from mlx_empire.comm.protocol import Communicator
from mlx_empire.data.batches import validation_micro_batches
from mlx_empire.data.splits import Splits
from mlx_empire.engine.trainer import Trainer
from mlx_empire.evaluation.gate import GateKeeper, held_out_loss
from mlx_empire.model.target import Target
from mlx_empire.plan.chips import known_speed
from mlx_empire.plan.shares import RunPlan
from mlx_empire.plan.work import executed_flops
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.run import RunReport
from mlx_empire.run import result
from mlx_empire.run.agree import share_gate
from mlx_empire.run.job import Job
from mlx_empire.run.resume import stopped
from mlx_empire.run.stop import StopRequest
from mlx_empire.run.trainer import go_back

if TYPE_CHECKING:
    from mlx_empire.evaluation.evaluator import Evaluator
    from mlx_empire.evaluation.reading import RowReader
    from mlx_empire.report.trace import RunTrace


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
    taken = trainer.train_step(
        job.batches(step), job.targets(step), step, job.rates(step), job.strength(step)
    )

    seconds, moved = time.perf_counter() - started, comm.traffic.since(traffic)
    line = job.record(step, taken, seconds)
    line |= speed(run, job.positions(step), seconds)
    line["waited_for"] = {**taken.waited_for, "save": run.saver.held_up()}
    report.step(line, sum(moved.sent), sum(moved.received))
    for told in taken.untraced:
        report.message(told)
    if taken.note:
        report.message(taken.note)
        report.notify("spike", taken.note)
    if taken.go_back:
        report.message(go_back(comm, run.recipe, trainer, run.saver))
    return float(line["time"])


def traced(run: Run) -> RunTrace:
    """What notes a few steps for a trace, beside what the plan predicts of them."""
    from mlx_empire.report.trace import RunTrace, predicted_events

    target, optimizer = run.target.spec, run.trainer.optimizer
    predicted = partial(predicted_events, run.recipe, run.plan, target, run.nodes, optimizer)
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
        readings = run.reader.read(run.trainer, comm, most)
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
