"""Which file systems a run writes to and what is free there: seen by each rank, or assumed for a dry run.

Decides what counts as free: what the system says, and what the run may give up itself (its own older checkpoints, and
what earlier attempts left). At launch every rank looks at its own disk. A run that would begin is refused where it
could not keep what it cannot do without; one that goes on is warned: its checkpoint is safe, and the end waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_empire.checkpoint.agree import find_folders
from mlx_empire.checkpoint.retention import reclaimable_bytes
from mlx_empire.cluster.hostfile import Node
from mlx_empire.cluster.match import is_this_machine
from mlx_empire.comm.failure import together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.data.cache import cache_folder, cached_bytes, tokens_beside
from mlx_empire.data.files import locate
from mlx_empire.data.taught import taught_bytes
from mlx_empire.disk import disk_of, free_bytes
from mlx_empire.errors import DoesNotFitError, UserError
from mlx_empire.formats.hf_folder import has_weights, open_folder
from mlx_empire.formats.hf_names import tower_names
from mlx_empire.formats.staging import side_files
from mlx_empire.model.target import Target
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.disk import Beside, DiskLedger, Keeping, Places, disk_ledgers, result_bytes
from mlx_empire.plan.offload import input_file_bytes
from mlx_empire.plan.shares import RunPlan
from mlx_empire.recipe.schema import Recipe
from mlx_empire.run.resume import checkpoint_folder


@dataclass(frozen=True)
class Spot:
    """A place that is written to: its file system, its path, and the bytes that are free there (None: not known)."""

    disk: str
    path: str
    free: int | None


@dataclass(frozen=True)
class Seen:
    """What a rank would write to; `others`: run.dir, model.path and the token cache, which are rank 0's.

    `folder` names its checkpoint folder, `reclaimable` are the bytes in it that may be given up.
    """

    host: str
    folder: str
    checkpoints: Spot
    others: tuple[Spot, ...]
    reclaimable: int = 0


def look_at_disks(recipe: Recipe, rank: int, host: str, name: str) -> Seen:
    """What `rank` would write to on the machine where this runs; `name`: the machine's, for people. Writes nothing."""
    root = checkpoint_folder(recipe, rank, host)
    others = tuple(_spot(path, host) for path in (recipe.run.dir, recipe.model.path, cache_folder()))
    return Seen(name, f"{host}:{root.resolve()}", _spot(root, host), others, reclaimable_bytes(root))


def assume_disks(recipe: Recipe, rank: int, node: Node) -> Seen:
    """What `rank` would write to on a machine that nobody asks: one disk, of which the hostfile says what is free."""
    root = checkpoint_folder(recipe, rank, node.name)
    spot = Spot(node.name, str(root), node.disk_bytes)
    return Seen(node.name, f"{node.name}:{root}", spot, (spot, spot, spot))


def planned_places(recipe: Recipe, nodes: Sequence[Node], own: str) -> Places:
    """Where a dry run's files would lie: as the hostfile says, and as seen on this machine (`own`: its name)."""
    return places_of(
        [
            look_at_disks(recipe, rank, own, node.name)
            if node.disk_bytes is None and is_this_machine(node.name, own)
            else assume_disks(recipe, rank, node)
            for rank, node in enumerate(nodes)
        ]
    )


def seen_places(comm: Communicator, recipe: Recipe, nodes: Sequence[Node]) -> Places:
    """Where a run's files lie, as each rank sees it. Collective; writes nothing."""
    return places_of(_all_seen(comm, recipe, nodes))


def places_of(seen: Sequence[Seen]) -> Places:
    """What the ranks see, put together; on a file system that several see, the least free counts."""
    free: dict[str, int] = {}
    names: dict[str, str] = {}
    for rank, one in enumerate(seen):
        spots = (one.checkpoints, *(one.others if rank == 0 else ()))
        several = len({spot.disk for spot in spots}) > 1
        for spot in spots:
            names.setdefault(spot.disk, f"{one.host} ({spot.path})" if several else one.host)
            if spot.free is not None:
                free[spot.disk] = min(spot.free, free.get(spot.disk, spot.free))
    for folder in dict.fromkeys(one.folder for one in seen):
        first = next(one for one in seen if one.folder == folder)
        if first.checkpoints.disk in free:
            free[first.checkpoints.disk] += first.reclaimable
    result, base, tokens = (spot.disk for spot in seen[0].others)
    folders, disks = (tuple(one.folder for one in seen), tuple(one.checkpoints.disk for one in seen))
    return Places(folders, disks, result, base, tokens, names, free)


def ledgers_of(
    recipe: Recipe, target: Target, plan: RunPlan, places: Places, steps: int | None, beside: Beside
) -> tuple[DiskLedger, ...]:
    """The disk ledgers of a recipe's plan; `steps` of the run, None where nobody knows."""
    keeping, states = Keeping.of(recipe.run, steps), state_bytes_of(recipe.optimizer)
    inputs = [
        input_file_bytes(target.spec, plan.shards, plan.work, rank) for rank in range(len(plan.ledgers))
    ]
    return disk_ledgers(target.spec, plan.shards, keeping, states, places, beside, inputs)


def what_else(recipe: Recipe, target: Target) -> Beside:
    """What a run writes beside its plan's bytes, as far as this machine can see."""
    folder = recipe.model.path
    missing = recipe.model.init == "pretrained" and not folder.exists()
    data, distillation = _data_bytes(recipe), recipe.distillation
    copied = recipe.data.packing or bool(recipe.data.validation_split)
    return Beside(
        carried_bytes(folder),
        result_bytes(target.base) if missing else 0,
        cached_bytes(data)
        + (taught_bytes(data, distillation.top) if distillation.teacher is not None else 0),
        tokens_beside(data, copied=copied) - cached_bytes(data),
    )


def carried_bytes(folder: Path) -> int:
    """Bytes of a model's folder that a full result gets besides what is trained: towers, tokenizer, licence."""
    if not folder.is_dir():
        return 0
    nbytes = sum(file.stat().st_size for file in side_files(folder) if file.is_file())
    with suppress(UserError):
        if has_weights(folder):
            stored = open_folder(folder)
            nbytes += sum(stored.tensors[n].stop - stored.tensors[n].start for n in tower_names(stored))
    return nbytes


def require_disks(
    comm: Communicator,
    recipe: Recipe,
    target: Target,
    plan: RunPlan,
    nodes: Sequence[Node],
    steps: int,
    *,
    resumed: bool,
) -> list[str]:
    """DoesNotFitError where a run that begins could not keep what it must; else what there is to say. Collective."""
    seen = _all_seen(comm, recipe, nodes)
    if recipe.run.save_every is not None and len(set(comm.hostnames)) > 1:  # machines may share a disk
        found = find_folders(comm, checkpoint_folder(recipe, comm.rank, comm.hostname))
        seen = [
            replace(one, folder=f"rank {leader}", checkpoints=replace(one.checkpoints, disk=disk))
            for one, leader, disk in zip(seen, found.leaders, found.disks, strict=True)
        ]
    carried = comm.broadcast_json(carried_bytes(recipe.model.path) if comm.rank == 0 else None)
    ledgers = ledgers_of(recipe, target, plan, places_of(seen), steps, Beside(carried=carried))
    with together(comm):
        short = [one.reason for one in ledgers if one.verdict == "no"]
        if short and not resumed:
            with suppress(OSError):
                checkpoint_folder(recipe, comm.rank, comm.hostname).rmdir()  # made by the search, empty
            raise DoesNotFitError(f"{'; '.join(short)}; {remedies(recipe)}")
    return [f"WARNING: {one.reason}" for one in ledgers if one.reason]


def remedies(recipe: Recipe) -> str:
    """What could be changed where a disk is too small, without what is so already."""
    full = recipe.tuning.type == "full"
    options = [
        ("memory.activation_offload: false", recipe.memory.activation_offload is not False),
        ("optimizer.state_bits: 8", recipe.optimizer.state_bits != 8 and recipe.run.save_every is not None),
        ("optimizer.master_weights: diet", recipe.optimizer.master_weights in ("exact", "fp32") and full),
        ("tuning.type: lora", full),
        ("run.checkpoints or run.dir on another disk", True),
    ]
    return "free some room, or try " + ", ".join(text for text, open_to in options if open_to)


def _all_seen(comm: Communicator, recipe: Recipe, nodes: Sequence[Node]) -> list[Seen]:
    own = look_at_disks(recipe, comm.rank, comm.hostname, nodes[comm.rank].name)
    return [_read(fields) for fields in comm.gather_json(_written(own))]


def _written(one: Seen) -> list[Any]:
    spots = [[spot.disk, spot.path, spot.free] for spot in (one.checkpoints, *one.others)]
    return [one.host, one.folder, spots, one.reclaimable]


def _read(fields: Sequence[Any]) -> Seen:
    host, folder, (first, *others), reclaimable = fields
    return Seen(host, folder, Spot(*first), tuple(Spot(*spot) for spot in others), reclaimable)


def _spot(path: Path, host: str) -> Spot:
    try:
        return Spot(disk_of(path, host), str(path), free_bytes(path))
    except OSError:
        return Spot(f"{host}:{path}", str(path), None)


def _data_bytes(recipe: Recipe) -> int:
    """What is tokenised; 0 where the data is not on this machine."""
    try:
        found = [source for path in recipe.data.paths for source in locate(path) if source is not None]
        return sum(file.stat().st_size for one in found for file in one.files)
    except (UserError, OSError):
        return 0
