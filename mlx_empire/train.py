"""Train a model: `python -m mlx_empire.train RECIPE [--hosts FILE] [--dry-run] [key=value ...]`, alone or under
mpirun.

The run's story from top to bottom: what is asked for, where it runs, what is trained on what, the plan, the proof
that the model can be streamed, the weights, the steps, the result. Every rank runs all of it; rank 0 also talks to
the user and writes the run's folder.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_empire import assemble, beacon, capacity, continuing, phases, result, safeguards
from mlx_empire.arguments import UserArguments
from mlx_empire.checkpoint.save import Saver
from mlx_empire.comm.connect import connect
from mlx_empire.comm.failure import guard, together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.data.batches import micro_batch, positions, valid_tokens, validation_micro_batches
from mlx_empire.data.splits import Splits
from mlx_empire.engine.replicas import replicas_agree
from mlx_empire.engine.trainer import StepResult, Trainer
from mlx_empire.engine.twin import verify_twin
from mlx_empire.evaluate.evaluator import Evaluator
from mlx_empire.evaluate.gate import GateKeeper
from mlx_empire.evaluate.held_out import held_out_loss
from mlx_empire.model.target import Target
from mlx_empire.optim.choose import make_optimizer
from mlx_empire.optim.flat import FlatOptimizer
from mlx_empire.plan.hardware import known_speed
from mlx_empire.plan.model import RootNames
from mlx_empire.plan.resolve import RunPlan, require_fit, resolve
from mlx_empire.plan.step_time import Event
from mlx_empire.plan.work import executed_flops
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.folder import refuse_finished, refuse_unwritable, write_plan
from mlx_empire.report.run import RunReport
from mlx_empire.report.trace import RunTrace, predicted_events
from mlx_empire.result import Patience, Refusal
from mlx_empire.safeguards import Safeguards
from mlx_empire.supervise.awake import keep_awake
from mlx_empire.supervise.stop import StopRequest


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = UserArguments(prog="python -m mlx_empire.train", description="Train a model by a recipe.")
    parser.add_argument("recipe", type=Path, help="the YAML recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as memory.zero_stage=2 run.steps=5"
    )
    parser.add_argument("--hosts", type=Path, help="the hostfile, where mpirun's own cannot be found")
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what it will need (see mlx_empire.capacity)"
    )
    with guard(None):
        comm = connect()
    with guard(comm):
        phases.begin(comm.rank)
        if beacon.lit():
            keep_awake()
        options = parser.parse_intermixed_args(arguments)
        if options.dry_run:
            wanted = capacity.Wanted(hosts=options.hosts)
            return capacity.answer(comm, options.recipe, options.overrides, wanted)
        begin(comm, options.recipe, options.overrides, options.hosts)
    return 0


def begin(comm: Communicator, recipe_path: Path, overrides: Sequence[str], hosts: Path | None) -> None:
    """The whole run on this rank."""
    # ---------------------------------------------------------------- what is asked for, and where it runs
    safeguards.greet(comm, recipe_path, overrides)
    recipe = assemble.share_recipe(comm, recipe_path, overrides)
    comm = connect(recipe.comm.route, recipe.comm.bucket_bytes, recipe.comm.deadline_seconds)
    with safeguards.standing(comm, recipe) as guards, StopRequest() as stop:
        carry_out(comm, recipe, hosts, guards, stop)


def carry_out(
    comm: Communicator, recipe: Recipe, hosts: Path | None, guards: Safeguards, stop: StopRequest
) -> None:
    """The run itself, once the ranks know each other and what is asked for."""
    nodes = assemble.share_nodes(comm, recipe, hosts)
    with together(comm):
        if comm.rank == 0:
            refuse_finished(recipe.run.dir)
            refuse_unwritable(recipe.run.dir)
            result.refuse_taken(recipe)

    # ---------------------------------------------------------------- what is trained, on what
    safeguards.agree_on_model(comm, recipe)
    config = assemble.share_config(comm, recipe)
    built = assemble.build(comm, recipe, config)
    spec = built.spec
    with together(comm):
        if comm.rank == 0:
            result.refuse_impossible(recipe, built)
    splits = assemble.share_data(comm, recipe, spec)

    # ---------------------------------------------------------------- where it goes on
    start = continuing.where_to_begin(comm, recipe, built, splits)
    recipe = start.recipe

    # ---------------------------------------------------------------- the proof that it can be streamed
    shown = None
    with together(comm):
        if comm.rank == 0:
            shown = asdict(verify_twin(config, str(recipe.model.path)))
    root_names = RootNames(**comm.broadcast_json(shown))
    built = replace(built, spec=replace(built.spec, root_names=root_names))
    spec = built.spec

    # ---------------------------------------------------------------- the plan, before anything is allocated
    optimizer = make_optimizer(recipe.optimizer)
    with together(comm):
        assemble.refuse_idle_keys(recipe, splits)
        plan = resolve(recipe, spec, nodes, optimizer.state_bytes)
        require_fit(plan, nodes)
    guards.lock(recipe.run.dir)
    evaluator = assemble.share_evaluator(comm, recipe, spec, plan)

    # ---------------------------------------------------------------- the weights
    phases.reach("load")
    limit_memory(plan, comm.rank)
    with CommThread() as thread:
        trainer = make_trainer(comm, thread, recipe, built, plan, optimizer)
        sent = continuing.load_state(comm, recipe, built, trainer, start, optimizer)
        trainer.prepare(packing=recipe.data.packing, fresh=start.found is None)

        # ------------------------------------------------------------ from here on something is written
        started_over = (recipe.run.dir / "metrics.jsonl").exists()
        steps = assemble.total_steps(recipe, splits)
        with together(comm):
            if comm.rank == 0:
                write_plan(recipe, plan, nodes, spec, splits, resumed=start.found is not None)
        with (
            RunReport(comm, recipe, spec, plan, nodes, steps, start.resumed) as report,
            continuing.open_saver(comm, plan, trainer.store, start) as saver,
        ):
            stop.watch(recipe.run.dir)
            trainer.hold_updates(saver.hold)
            report.show_status(lambda: saver.status)
            report.messages([*guards.notes, *splits.report, *start.told(started_over)])
            if sent:
                report.message(f"weights read by rank 0 ({comm.hostnames[0]}) and sent to the other ranks")
            predicted = partial(predicted_events, recipe, spec, nodes, optimizer)
            peak = known_speed(nodes)
            run = Run(
                comm, recipe, plan, built, trainer, splits, evaluator, report, saver, stop, predicted, peak
            )
            export(run, *train(run))
            report.messages(saver.unsaved())


def make_trainer(
    comm: Communicator,
    thread: CommThread,
    recipe: Recipe,
    built: Target,
    plan: RunPlan,
    optimizer: FlatOptimizer,
) -> Trainer:
    """The trainer that the recipe asks for, without weights."""
    clip, noise = recipe.optimizer.clip_norm, recipe.run.seed if recipe.tuning.dropout else None
    shards, work = plan.shards, plan.work
    trainer = Trainer(built.model, built.spec, shards, work, comm, thread, optimizer, clip, noise)
    trainer.spikes = safeguards.spike_watch(recipe)
    if recipe.optimizer.statistics_every is not None:
        trainer.watch_states(optimizer, recipe.optimizer.statistics_every)
    return trainer


@dataclass(frozen=True)
class Run:
    """What the loop works with."""

    comm: Communicator
    recipe: Recipe
    plan: RunPlan
    built: Target
    trainer: Trainer
    splits: Splits
    evaluator: Evaluator | None
    report: RunReport
    saver: Saver
    stop: StopRequest
    predicted: Callable[[], Sequence[Event]]
    peak_flops: float | None


def train(run: Run) -> tuple[int, GateKeeper]:
    """The steps that are left, with evaluation and saving in between, until they are done or the gate is reached.

    Returns the last step, and the gate.
    """
    comm, recipe, trainer, report, saver = run.comm, run.recipe, run.trainer, run.report, run.saver
    data, seed, global_size = run.splits.train, recipe.run.seed, recipe.batch.global_size
    steps = assemble.total_steps(recipe, run.splits)
    tokens, epochs = assemble.pace(recipe, data)
    rates = assemble.learning_rate_of(recipe, steps, tokens, epochs)
    every, save_every = (
        duration.to_steps(steps, tokens, epochs) if duration else 0
        for duration in (recipe.run.eval_every, recipe.run.save_every)
    )
    mine = [j for cell in run.plan.work.layout.of_rank(comm.rank) for j in cell]
    sizes = {"global_size": global_size, "micro_size": recipe.batch.micro_size}
    if save_every:
        saver.open()
    gate = assemble.gate_keeper(comm, recipe)
    if every and not saver.newest:
        evaluate(run, 0, gate)
    trace = RunTrace(comm, recipe.run.dir, trainer, saver, run.predicted) if recipe.report.trace else None
    step, done, reason = saver.newest, gate.reached, None
    while step < steps and not done and not reason:
        step += 1
        started, traffic = time.perf_counter(), comm.traffic.snapshot()

        # ------------------------------------------------------------ one step
        phases.begin_step(step)
        phases.reach("data")
        batches = [micro_batch(data, seed, step - 1, j, **sizes) for j in mine]
        total = valid_tokens(data, seed, step - 1, global_size=global_size)
        taken = trainer.train_step(batches, total, step, rates(step))

        # ------------------------------------------------------------ what the user sees
        seconds = time.perf_counter() - started
        moved = comm.traffic.since(traffic)
        passed = positions(data, seed, step - 1, **sizes)
        line = record(step, taken, rates(step), seconds, targets=total, positions=passed)
        line |= speed(
            executed_flops(run.built.spec, run.plan.work, passed, global_size), seconds, run.peak_flops
        )
        line["waited_for"] = {**taken.waited_for, "save": saver.held_up()}
        report.step(line, sum(moved.sent), sum(moved.received))
        if taken.note:
            report.message(taken.note)
        if taken.go_back:
            report.message(continuing.go_back(comm, recipe, trainer, saver))
        done = step == steps
        if trace is not None:
            report.messages(trace.step())
        if every and (done or step % every == 0):
            evaluate(run, step, gate)
            done = done or gate.reached

        # ------------------------------------------------------------ what survives a crash
        reason = None if done else run.stop.agreed(comm)
        if reason or (save_every and (done or step % save_every == 0)):
            save(run, step)  # written while the next step computes
        report.messages(saver.news())
    if trace is not None:
        report.messages(trace.finish())
    saver.finish()
    report.messages(saver.news())
    if reason:
        raise continuing.stopped(saver, step, reason)
    return step, gate


def save(run: Run, step: int) -> None:
    """Begin to save the state after `step`."""
    replicas_agree(run.trainer.store, run.comm)
    run.saver.request(step, run.trainer.carried())


def record(
    step: int, result: StepResult, rate: float, seconds: float, *, targets: int, positions: int
) -> dict[str, Any]:
    """One line of metrics.jsonl; figures by rank are added by the report.

    `targets` that count in the whole step, and input `positions` computed for them, padding included.
    """
    return {
        "step": step,
        "loss": result.loss,
        "learning_rate": rate,
        "grad_norm": result.gradient_norm,
        "tokens": targets,
        "tokens_per_second": targets / seconds,
        "positions": positions,
        "positions_per_second": positions / seconds,
        "step_seconds": seconds,
        "comm_wait_seconds": result.wait_seconds,
        **({"skipped": True} if result.skipped else {}),
        **result.statistics,
    }


def speed(flops: float, seconds: float, peak: float | None) -> dict[str, float | None]:
    """When a step ended (seconds since 1970), executed TFLOP/s of all ranks, and what part of their chips' that is."""
    rate = flops / seconds
    return {
        "time": time.time(),
        "executed_tflops": rate / 1e12,
        "chip_fraction": rate / peak if peak else None,
    }


def evaluate(run: Run, step: int, gate: GateKeeper) -> None:
    """Measure the held-out loss (None without a validation split) and the evaluation sets' scores; tell the gate."""
    phases.reach("evaluate")
    comm, recipe, valid = run.comm, run.recipe, run.splits.valid
    most = max(1, *(run.plan.work.micro_batches(r) for r in range(comm.size)))
    found: dict[str, Any] = {"step": step, "eval_loss": None}
    if valid is not None:
        batches = list(validation_micro_batches(valid, recipe.batch.micro_size, recipe.run.eval_batches))
        found["eval_loss"] = held_out_loss(run.trainer.streamed, comm, batches, most)
    if run.evaluator is not None:
        found["scores"] = run.evaluator.scores(run.trainer, comm, most)
    run.report.evaluation(found)
    gate.observe(found)


def limit_memory(plan: RunPlan, rank: int) -> None:
    """Hold MLX to the node's limit: freed buffers are kept for reuse only in what the plan leaves over."""
    limit, peak = plan.limits[rank], plan.ledgers[rank].peak
    mx.set_memory_limit(limit)
    mx.set_cache_limit(max(limit - peak, 1 << 28))
    mx.reset_peak_memory()


def export(run: Run, step: int, gate: GateKeeper) -> None:
    """Write `final/`, freeze it if the gate was reached, then `COMPLETE`; wait as long as a disk refuses.

    A run that waits and is asked to stop saves what is not saved yet.
    """
    comm, recipe, built, trainer, saver = run.comm, run.recipe, run.built, run.trainer, run.saver
    said: list[str] = []

    def stop_if_asked() -> None:
        if reason := run.stop.agreed(comm):
            save(run, step)
            saver.finish()
            run.report.messages(saver.news())
            raise continuing.stopped(saver, step, reason)

    def seal() -> Refusal | list[str]:
        return result.attempted(comm, lambda: said.extend(result.seal(recipe, gate))) or said

    patience = Patience(comm, result.final_of(recipe), run.report, saver, stop_if_asked)
    patience.until_written(lambda: result.write_final(recipe, built, trainer.store, comm))
    patience.until_written(seal)


if __name__ == "__main__":
    sys.exit(main())
