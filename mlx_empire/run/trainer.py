"""The trainer that a recipe asks for, what MLX may keep of memory, and where weights and states come from.

They come from the model's folder, chance, or a checkpoint, and from that again after a leap. Every rank reads the
model's folder, or rank 0 alone has it and sends each rank its part. Either way tensors pass one at a time, so no rank
holds more than its shard plus one unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from mlx_empire import progress
from mlx_empire.checkpoint.find import CheckpointSearch
from mlx_empire.checkpoint.restore import Restore
from mlx_empire.checkpoint.save import Saver
from mlx_empire.cluster.hostfile import Node
from mlx_empire.cluster.machine import WIRING_MACOS, computes_on_gpu, macos_version
from mlx_empire.comm.buffers import DTYPES, host_view
from mlx_empire.comm.failure import together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine.input_file import InputFile
from mlx_empire.engine.loss_scale import FIRST, LossScale
from mlx_empire.engine.numerics import SpikeWatch
from mlx_empire.engine.store import ShardStore
from mlx_empire.engine.trainer import Trainer, TrainerSettings
from mlx_empire.errors import of_gpu
from mlx_empire.formats.hf_folder import has_weights
from mlx_empire.formats.source import FolderSource, RandomSource, TunedSource, WeightSource
from mlx_empire.model.spec import ModelSpec
from mlx_empire.model.target import Target
from mlx_empire.optim.choose import make_optimizer
from mlx_empire.plan.activations import hidden_bytes
from mlx_empire.plan.assess import cache_bound
from mlx_empire.plan.offload import file_places
from mlx_empire.plan.refusal import needs_in_words
from mlx_empire.plan.shards import Placement, Segment, Unit
from mlx_empire.plan.shares import RunPlan
from mlx_empire.plan.wired_limit import wired_bytes
from mlx_empire.plan.workload import step_shape
from mlx_empire.recipe.schema import Recipe
from mlx_empire.run.parent import Parent
from mlx_empire.run.resume import Start, checkpoint_folder, folder_of
from mlx_empire.sizes import amount


def fill_from_own(store: ShardStore, source: WeightSource) -> None:
    """Each rank reads what it keeps from its own source."""
    for unit in store.plan.units:
        store.load(unit.index, source.unit(unit.index))


def fill_from_root(
    store: ShardStore, spec: ModelSpec, source: WeightSource | None, comm: Communicator
) -> None:
    """Rank 0 reads; every tensor is scattered to its owners, and gathered where weights stay whole. Collective."""
    assert (source is not None) == (comm.rank == 0), "rank 0 alone has a source"
    for unit in store.plan.units:
        with store.loading(unit):
            _fill_unit(store, spec, unit, source, comm)


def _fill_unit(
    store: ShardStore, spec: ModelSpec, unit: Unit, source: WeightSource | None, comm: Communicator
) -> None:
    buffers, views, starts = store.landing(unit)
    tensors = source.unit(unit.index) if source is not None else None
    for tensor in spec.units[unit.index].tensors:
        _, s, placement = store.plan.tensors[tensor.name]
        flat = None
        if tensors is not None:
            found, array = next(tensors)
            assert found.name == tensor.name, "a source yields tensors in the spec's order"
            flat = host_view(array.astype(DTYPES[unit.segments[s].dtype]))
        _scatter(comm, unit.segments[s], placement, flat, views[s], starts[s])
    if store.keeps_whole:
        for view, segment in zip(views, unit.segments, strict=True):
            comm.all_gather(view, segment.edges)
    store.landed(unit, buffers)


def _scatter(
    comm: Communicator,
    segment: Segment,
    placement: Placement,
    flat: np.ndarray | None,
    view: np.ndarray,
    start: int,
) -> None:
    """Send one tensor's elements to their owners; `view` is what this rank keeps, from element `start` on."""
    edges = _within(segment.edges, placement)
    a, b = edges[comm.rank] + placement.start, edges[comm.rank + 1] + placement.start
    comm.scatter(flat, edges, view[a - start : b - start], 0)


def _within(edges: Sequence[int], placement: Placement) -> list[int]:
    """The segment's edges as seen from inside one tensor."""
    size = placement.tensor.size
    return [min(max(edge - placement.start, 0), size) for edge in edges]


def make_trainer(
    comm: Communicator, thread: CommThread, recipe: Recipe, target: Target, plan: RunPlan
) -> Trainer:
    """A rank's trainer, without weights: they are loaded next, and `Trainer.prepare` ends it."""
    optimizer, settings = make_optimizer(recipe.optimizer), trainer_settings(recipe)
    inputs = input_file(comm, recipe, target.spec, plan)
    trainer = Trainer(
        target.model, target.spec, plan.shards, plan.work, comm, thread, optimizer, settings, inputs
    )
    trainer.gradients.reuse(plan.ledgers[comm.rank].spare)
    return trainer


def input_file(comm: Communicator, recipe: Recipe, spec: ModelSpec, plan: RunPlan) -> InputFile | None:
    """Where layers' inputs go on this rank, beside its checkpoints; None where they stay. Made by the first step, if
    not before."""
    count = file_places(step_shape(plan.shards, plan.work, comm.rank))
    folder = checkpoint_folder(recipe, comm.rank, comm.hostname)
    return InputFile(folder, count, hidden_bytes(spec, plan.work)) if count else None


def trainer_settings(recipe: Recipe) -> TrainerSettings:
    """What the recipe chooses of a step; for one trainer."""
    optimizer, numerics = recipe.optimizer, recipe.numerics
    return TrainerSettings(
        clip_norm=optimizer.clip_norm,
        noise_seed=recipe.run.seed if recipe.tuning.dropout else None,
        spikes=SpikeWatch(numerics.spikes, numerics.threshold, numerics.window, numerics.max_skips),
        statistics_every=optimizer.statistics_every,
        loss_scale=_loss_scale(recipe),
    )


def _loss_scale(recipe: Recipe) -> LossScale:
    asked = recipe.numerics.loss_scale
    if recipe.dynamic_loss_scale:
        return LossScale(FIRST, recipe.numerics.loss_scale_window)
    return LossScale() if asked == "auto" else LossScale(asked)


def limit_memory(plan: RunPlan, rank: int, asked: str | int, node: Node) -> str | None:
    """Hold MLX to the node's limit, its cache to `cache_bound`, and wire what the recipe asks for (`memory.wired`).

    What was chosen, in words; None where there is nothing to wire: only Metal has it. UserError from `wired_bytes`.
    """
    limit, peak = plan.limits[rank], plan.ledgers[rank].peak
    said = None
    if mx.metal.is_available() and computes_on_gpu():
        most = int(mx.device_info()["max_recommended_working_set_size"])
        wired, why = wired_bytes(asked, peak, node)
        if (macos_version() or WIRING_MACOS) < WIRING_MACOS:
            wired, why = 0, f"macOS {macos_version()} cannot; {WIRING_MACOS} and newer can"
        wired = min(wired, most)
        mx.set_wired_limit(wired)
        said = f"{node.name}: {amount(wired)} of memory wired ({why})"
    mx.set_memory_limit(limit)
    mx.set_cache_limit(cache_bound(limit, peak))
    mx.reset_peak_memory()
    return said


@contextmanager
def explaining_memory(plan: RunPlan, rank: int) -> Iterator[None]:
    """Around a run's work: an error of the GPU is raised as `of_gpu` says, with what the ledger said of memory."""
    try:
        yield
    except RuntimeError as error:
        told = of_gpu(error, f"by the plan this rank needs {needs_in_words(plan, rank)}")
        if told is None:
            raise
        raise told from error


def load_weights(
    comm: Communicator, recipe: Recipe, target: Target, store: ShardStore, parent: Parent | None = None
) -> bool:
    """Fill the shards from the model's folder, or at random; True if rank 0 alone had the folder. Collective.

    `parent`: what adapters begin from on the ranks that have it, rank 0 among them; None on all: from fresh values.
    """
    folder, seed = recipe.model.path, recipe.run.seed

    def tuned(base: WeightSource) -> WeightSource:
        first = parent.weights if parent is not None else None
        alone = target.adapters is None and not target.ternary
        return base if alone else TunedSource(base, target.spec, seed, target.packing, first)

    if recipe.model.init == "random":
        fill_from_own(store, tuned(RandomSource(target.rebuild, target.base, seed)))
        return False
    # The base's weights, and what the adapters begin from: both lie on every rank, or rank 0 sends them.
    held = comm.gather_json([has_weights(folder), parent is not None])
    everywhere = all(weights for weights, _ in held) and len({begun for _, begun in held}) == 1
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


def load_state(
    comm: Communicator, target: Target, trainer: Trainer, start: Start, parent: Parent | None
) -> bool:
    """Weights from the model's folder or, with the optimizer's states, from a checkpoint. Collective.

    Frozen weights are not in a checkpoint, so where there are some the folder is read as well; `parent` is not, for all
    that adapters hold is in the checkpoint. True if rank 0 alone had it.
    """
    recipe = start.recipe
    if start.found is None:
        return load_weights(comm, recipe, target, trainer.store, parent)
    with together(comm):
        restore = Restore(start.found, trainer.store, comm)
    sent = target.spec.has_frozen and load_weights(comm, recipe, target, trainer.store)
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
