"""The earlier adapter that a run begins from (`tuning.start`): whether it may, its weights, and what it has seen.

Decides that it must be finished, as it was when it was frozen, of the same base where that is known (or of that
base packed as it was trained, by `export base`), and of the shape and scale that the recipe asks for. It is read
when a run begins and never again: a checkpoint holds all that adapters are. The optimizer begins afresh. Where a
run comes from stands in its `plan.json` (`start`), from where the model card has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_empire.comm.failure import together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.errors import UserError, on_all_ranks
from mlx_empire.formats.adapter_folder import WEIGHTS_NAME, Adapter, read_adapter
from mlx_empire.formats.peft import PEFT_WEIGHTS
from mlx_empire.formats.seal import bytes_and_digest, check_sealed, sealed_digest
from mlx_empire.model.target import Target
from mlx_empire.recipe.load import load_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.metrics import read_metrics
from mlx_empire.run.finished import Finished, finished
from mlx_empire.run.names import plan_of

KEY = "tuning.start"
SAME_SCALE = 1e-6  # PEFT keeps alpha, from which the scale comes with a rounding


@dataclass(frozen=True)
class Lineage:
    """Where a run began: the earlier adapter's folder, the SHA-256 of its file, the rows that it had seen with all
    before it (None: not known), and the digests of those, the latest first.
    """

    path: str
    digest: str
    rows_seen: int | None
    before: tuple[str, ...]


@dataclass(frozen=True)
class Parent:
    """An earlier adapter that fits: its tensors by mlx-lm's names (lazy), and what is said of where it comes from."""

    weights: Mapping[str, mx.array]
    lineage: Lineage


def share_parent(comm: Communicator, recipe: Recipe, target: Target, base: str | None) -> Parent | None:
    """What tuning.start names, on the ranks that have it, rank 0 among them; None without. Collective.

    `base`: the digest of the base's weights as they are now.
    """
    start = recipe.tuning.start
    if start is None:
        return None
    everywhere = all(comm.gather_json(start.exists()))
    found = None
    with together(comm):
        if everywhere or comm.rank == 0:
            found = read_parent(recipe, target, base)
    digests = comm.gather_json(found.lineage.digest if found is not None else None)
    if everywhere and len(set(digests)) > 1:
        odd = [comm.hostnames[r] for r, digest in enumerate(digests) if digest != digests[0]]
        raise on_all_ranks(
            UserError(
                f"{KEY}: {start}: {', '.join(odd)} and {comm.hostnames[0]} have different ones; copy it anew"
            )
        )
    return found


def read_parent(recipe: Recipe, target: Target, base: str | None) -> Parent:
    """What tuning.start names, for a machine alone. UserError unless the recipe may go on from it."""
    start = recipe.tuning.start
    assert start is not None
    assert target.adapters is not None, "the schema refuses it for full tuning"
    found = finished(start, KEY)
    if not found.adapter:
        raise UserError(f"{KEY}: {start}: no adapter; a whole model is a base: name it in model.path")
    if (digest := sealed_digest(found.weights)) is not None:
        check_sealed(found.weights, digest)
    if base is not None and not found.speaks_on(recipe.model.path, base, named=False):
        raise UserError(
            f"{KEY}: {start}: was trained on other weights than those in {recipe.model.path}; name its base in "
            "model.path, or leave tuning.start out"
        )
    adapter = read_adapter(found.weights, target.base)
    _require_alike(adapter, target, start)
    before = lineage_in(found.plan)
    older = () if before is None else (before.digest, *before.before)
    return Parent(adapter.weights, Lineage(str(start), _digest(found.weights), rows_seen(found), older))


def lineage_of(run: Path) -> Lineage | None:
    """Where the run in a folder began, as its plan.json says; None for one that began afresh, or is not there."""
    return lineage_in(plan_of(run))


def lineage_in(plan: Mapping[str, Any]) -> Lineage | None:
    """The same from what plan.json holds."""
    with suppress(KeyError, TypeError):
        told = plan["start"]
        return Lineage(told["path"], told["digest"], told["rows_seen"], tuple(told["before"]))
    return None


def beside_plan(base: str | None, lineage: Lineage | None) -> dict[str, object]:
    """What plan.json says of a run's origin: the digest of frozen weights, and what it began from."""
    origin = {"base_digest": base, "start": None if lineage is None else asdict(lineage)}
    return {key: value for key, value in origin.items() if value is not None}


def rows_seen(found: Finished) -> int | None:
    """Rows that a finished adapter has learnt from, with those of all that it comes from; None: not known."""
    if found.run is None:
        return None
    before = lineage_in(found.plan)
    if before is not None and before.rows_seen is None:
        return None
    try:
        steps = max((r["step"] for r in read_metrics(found.run) if "loss" in r), default=0)
        own = steps * load_recipe(found.run / "recipe.yaml").batch.global_size
    except (OSError, KeyError, UserError):
        return None
    return own + (0 if before is None or before.rows_seen is None else before.rows_seen)


def _digest(weights: Path) -> str:
    name = WEIGHTS_NAME if (weights / WEIGHTS_NAME).exists() else PEFT_WEIGHTS
    return f"sha256:{bytes_and_digest(weights / name)['sha256']}"


def _require_alike(adapter: Adapter, target: Target, start: Path) -> None:
    """UserError unless the adapter is of the kind, rank, scale, targets and shapes that are to be trained."""
    theirs, ours = adapter.settings, target.adapters
    assert ours is not None
    kinds = {True: "DoRA", False: "LoRA"}
    if theirs.dora != ours.dora:
        raise UserError(
            f"{KEY}: {start}: is of {kinds[theirs.dora]}, the recipe asks for {kinds[ours.dora]}; change tuning.type"
        )
    if theirs.rank != ours.rank:
        raise UserError(
            f"{KEY}: {start}: has rank {theirs.rank}, not {ours.rank}; set tuning.rank: {theirs.rank}"
        )
    if not math.isclose(theirs.scale, ours.scale, rel_tol=SAME_SCALE):
        raise UserError(
            f"{KEY}: {start}: is scaled by {theirs.scale:g}, not {ours.scale:g}; with tuning.rslora: null set "
            f"tuning.alpha: {theirs.scale * theirs.rank:g}"
        )
    wanted = {t.name: t.shape for unit in target.spec.units for t in unit.tensors if t.trainable}
    found = {name: tuple(array.shape) for name, array in adapter.weights.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            has = f"has {name} as {found[name]}" if name in found else f"has no {name}"
            asked = f"is {wanted[name]} here" if name in wanted else "is not asked for"
            raise UserError(
                f"{KEY}: {start}: {has}, which {asked}; set tuning.targets and tuning.layers as it was "
                "trained, and its base in model.path"
            )
