"""Where weights and states come from: the model's folder, chance, or a checkpoint; and back to it after a leap."""

from __future__ import annotations

from mlx_empire import progress
from mlx_empire.checkpoint.distribute import fill_from_own, fill_from_root
from mlx_empire.checkpoint.find import CheckpointSearch
from mlx_empire.checkpoint.restore import Restore
from mlx_empire.checkpoint.save import Saver
from mlx_empire.comm.failure import together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.engine.store import ShardStore
from mlx_empire.engine.trainer import Trainer
from mlx_empire.formats.hf_folder import has_weights
from mlx_empire.formats.source import FolderSource, RandomSource, TunedSource, WeightSource
from mlx_empire.model.target import Target
from mlx_empire.recipe.schema import Recipe
from mlx_empire.run.resume import Start, folder_of


def load_weights(comm: Communicator, recipe: Recipe, target: Target, store: ShardStore) -> bool:
    """Fill the shards from the model's folder, or at random; True if rank 0 alone had the folder. Collective."""
    folder, seed = recipe.model.path, recipe.run.seed

    def tuned(base: WeightSource) -> WeightSource:
        return base if target.adapters is None else TunedSource(base, target.spec, seed, target.packing)

    if recipe.model.init == "random":
        fill_from_own(store, tuned(RandomSource(target.rebuild, target.base, seed)))
        return False
    everywhere = all(comm.gather_json(has_weights(folder)))
    source = None
    with together(comm):
        if everywhere or comm.rank == 0:
            source = tuned(FolderSource(folder, target.rebuild, target.base))
    if everywhere:
        assert source is not None
        fill_from_own(store, source)
    else:
        fill_from_root(store, target.spec, source, comm)
    return not everywhere


def load_state(comm: Communicator, target: Target, trainer: Trainer, start: Start) -> bool:
    """Weights from the model's folder or, with the optimizer's states, from a checkpoint. Collective.

    Frozen weights are not in a checkpoint, so with adapters the folder is read as well. True if rank 0 alone had it.
    """
    recipe = start.recipe
    if start.found is None:
        return load_weights(comm, recipe, target, trainer.store)
    with together(comm):
        restore = Restore(start.found, trainer.store, comm)
    sent = target.adapters is not None and load_weights(comm, recipe, target, trainer.store)
    restore.run(trainer.optimizer, recipe.optimizer.learning_rate)
    trainer.carry_on(start.found.manifest.numerics)
    return sent


def go_back(comm: Communicator, recipe: Recipe, trainer: Trainer, saver: Saver) -> str:
    """Put weights and states of the newest checkpoint into a run that goes on; what there is to say. Collective."""
    saver.finish()
    found = CheckpointSearch(comm, folder_of(recipe, comm)).newest() if saver.newest else None
    if found is None:
        return "there is no checkpoint to go back to: only this step's update is left out"
    progress.reach("load")
    with together(comm):
        restore = Restore(found, trainer.store, comm)
    restore.run(trainer.optimizer, recipe.optimizer.learning_rate)
    return f"weights and states are those after step {found.step} again, from {found.folder}"
