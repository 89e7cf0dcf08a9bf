"""How a run begins, goes on from a checkpoint, and leaves checkpoints: what the training loop asks of `checkpoint/`."""

from __future__ import annotations

from dataclasses import replace

from mlx_empire import assemble, progress
from mlx_empire.checkpoint.identity import Identity, base_digest, config_digest
from mlx_empire.checkpoint.manifest import Resolved
from mlx_empire.checkpoint.names import step_name
from mlx_empire.checkpoint.restore import Restore
from mlx_empire.checkpoint.resume import Start, find_start, folder_of, require_same, require_steps_left
from mlx_empire.checkpoint.save import Policy, Saver
from mlx_empire.checkpoint.survey import Survey
from mlx_empire.comm.failure import together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.data.splits import Splits
from mlx_empire.engine.store import ShardStore
from mlx_empire.engine.trainer import Trainer
from mlx_empire.errors import EmpireError, StoppedError, UnsavedError, on_all_ranks
from mlx_empire.optim.protocol import ShardOptimizer
from mlx_empire.plan.resolve import RunPlan
from mlx_empire.recipe.load import dump_recipe
from mlx_empire.recipe.schema import Recipe


def where_to_begin(comm: Communicator, recipe: Recipe, built: assemble.Built, splits: Splits) -> Start:
    """What run.resume asks for, if this run may go on from it: the errors are the same on all ranks. Collective."""
    start = find_start(comm, recipe)
    config = comm.broadcast_json(config_digest(recipe.model.path) if comm.rank == 0 else None)
    start = replace(start, data=splits.digest, base=base_of(comm, recipe, built), config=config)
    require_same(start)
    require_steps_left(start, assemble.total_steps(start.recipe, splits))
    return start


def base_of(comm: Communicator, recipe: Recipe, built: assemble.Built) -> str | None:
    """What identifies weights that are not trained, hence not saved; None where there are none. Collective."""
    if built.adapters is None or recipe.model.init == "random":
        return None
    digest = None
    with together(comm):
        if comm.rank == 0:
            digest = base_digest(recipe.model.path)
    return str(comm.broadcast_json(digest))


def load_state(
    comm: Communicator,
    recipe: Recipe,
    built: assemble.Built,
    trainer: Trainer,
    start: Start,
    optimizer: ShardOptimizer,
) -> bool:
    """Weights from the model's folder or, with the optimizer's states, from a checkpoint. Collective.

    Frozen weights are not in a checkpoint, so with adapters the folder is read as well. True if rank 0 alone had it.
    """
    if start.found is None:
        return assemble.load_weights(comm, recipe, built, trainer.store)
    with together(comm):
        restore = Restore(start.found, trainer.store, comm)
    sent = built.adapters is not None and assemble.load_weights(comm, recipe, built, trainer.store)
    restore.run(optimizer, recipe.optimizer.learning_rate)
    trainer.carry_on(start.found.manifest.numerics)
    return sent


def go_back(comm: Communicator, recipe: Recipe, trainer: Trainer, saver: Saver) -> str:
    """Put weights and states of the newest checkpoint into a run that goes on; what there is to say. Collective."""
    saver.finish()
    found = Survey(comm, folder_of(recipe, comm)).newest() if saver.newest else None
    if found is None:
        return "there is no checkpoint to go back to: only this step's update is left out"
    progress.reach("load")
    with together(comm):
        restore = Restore(found, trainer.store, comm)
    restore.run(trainer.optimizer, recipe.optimizer.learning_rate)
    return f"weights and states are those after step {found.step} again, from {found.folder}"


def stopped(saver: Saver, step: int, reason: str) -> EmpireError:
    """How a run ends that was asked to stop after `step`, the same on all ranks."""
    if saver.newest == step:
        again = "the same command goes on from there"
        return on_all_ranks(StoppedError(f"stopped by {reason}: {step_name(step)} is saved; {again}"))
    kept = f"{step_name(saver.newest)} is the newest" if saver.newest else "there is none"
    return on_all_ranks(UnsavedError(f"stopped by {reason}: {step_name(step)} could not be saved; {kept}"))


def open_saver(comm: Communicator, plan: RunPlan, store: ShardStore, start: Start) -> Saver:
    """What saves this run's checkpoints. Collective."""
    recipe = start.recipe
    resolved = Resolved(cells=plan.work.layout.cells, gradient_dtype=plan.work.gradient_dtype)  # type: ignore[arg-type]
    identity = Identity(
        dump_recipe(recipe),
        start.data,
        recipe.batch.global_size,
        recipe.run.seed,
        start.base,
        resolved,
        plan.shards,
        start.config,
    )
    policy = Policy(recipe.run.keep_last, recipe.run.buddy)
    units = range(len(plan.shards.units))
    # Where units are updated in the backward, the last one is the first, and the root comes last of all.
    order = [*reversed(units[1:]), 0] if plan.work.release else list(units)
    return Saver(comm, store, folder_of(recipe, comm), identity, policy, start.step, order)
