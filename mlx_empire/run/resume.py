"""Where a run goes on: the checkpoint that the recipe asks for, and whether the recipe may go on from it.

Decides what must be as it was when a run, or a daughter, began: the recipe, the rows, the weights that it began with
and the model's configuration. Where they lie does not matter.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from mlx_empire.checkpoint.find import CheckpointSearch, FoundCheckpoint
from mlx_empire.checkpoint.manifest import Identity, Origin, Resolved, config_digest, sampled_digest
from mlx_empire.checkpoint.paths import refuse_broken_link, step_name, step_of, steps_in
from mlx_empire.checkpoint.save import Policy, Saver
from mlx_empire.comm.failure import together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.data.splits import Splits
from mlx_empire.engine.store import ShardStore
from mlx_empire.errors import EmpireError, StoppedError, UnsavedError, UserError, on_all_ranks
from mlx_empire.model.target import Target
from mlx_empire.plan.fill import Recomputation
from mlx_empire.plan.shares import RunPlan
from mlx_empire.recipe.changes import parse_stored, require_acceptable, value, variant
from mlx_empire.recipe.load import dump_recipe, parse_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.metrics import read_metrics

RECOMPUTATION = "memory.gradient_checkpointing", "memory.keep_products"
# May be spelled in another way where the same is found there.
DATA, MODEL, TEACHER = "data.path", "model.path", "distillation.teacher"


# ---- what must be as it was


def require_same(
    before: Origin, now: Origin, where: str, anew: str = "begin anew with run.resume=never"
) -> list[str]:
    """UserError unless what began as `before` (noted in `where`) may go on as `now`; a line for each key that differs.

    What `now`'s recipe accepts by run.accept_changes may differ, and keys that change no bit of the result. `anew`:
    what else may be done where rows or weights are others.
    """
    recipe = parse_stored(now.recipe, "the recipe")
    accepted = recipe.run.accept_changes
    by_digest = [
        DATA,
        *([MODEL] if before.config else []),
        *([TEACHER] if before.teacher == now.teacher else []),
    ]
    lines = require_acceptable(
        parse_stored(before.recipe, f"the recipe of {where}"), recipe, [*accepted, *by_digest], where
    )
    for same, key, what in (
        (before.data == now.data, DATA, f"{recipe.data.named} holds other rows"),
        (before.base == now.base, MODEL, f"{recipe.model.path} holds other weights"),
        (
            not before.config or before.config == now.config,
            MODEL,
            f"{recipe.model.path} holds another config.json",
        ),
        (
            before.teacher == now.teacher or None in (before.teacher, now.teacher),
            TEACHER,
            f"{recipe.distillation.teacher} holds another teacher",
        ),
    ):
        if not same and not any(one.startswith(f"{key.split('.')[0]}.") for one in accepted):
            raise UserError(
                f"{where}: {key}: {what} than the run began with; bring back what was there, add "
                f"run.accept_changes=[{key}], or {anew}"
            )
    return lines


def require_steps_left(step: int, steps: int, where: str) -> None:
    """UserError where what is noted in `where` is of a `step` beyond the run's end."""
    if step > steps:
        raise UserError(
            f"run.steps: {steps}: {where} is of step {step} already; choose run.steps of at least {step}, or begin "
            "anew with run.resume=never"
        )


def base_of(comm: Communicator, recipe: Recipe, target: Target) -> str | None:
    """What identifies weights that are not trained, hence not saved; None where there are none. Collective."""
    if not target.spec.has_frozen or recipe.model.init == "random":
        return None
    digest = None
    with together(comm):
        if comm.rank == 0:
            digest = sampled_digest(recipe.model.path)
    return str(comm.broadcast_json(digest))


# ---- how a run begins


@dataclass(frozen=True)
class Start:
    """How a run begins: `recipe` with what an earlier start resolved, `origin` as things are now, and `found` to go on
    from (None: step 1)."""

    recipe: Recipe
    origin: Origin
    found: FoundCheckpoint | None = None
    notes: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.found.step if self.found is not None else 0

    @property
    def noted(self) -> Recomputation | None:
        """What an earlier start noted of recomputation; None where it noted nothing, or other is asked for now."""
        resolved = self.found.manifest.resolved if self.found is not None else None
        if self.found is None or resolved is None or resolved.unrecomputed is None:
            return None
        before = _stored(self.found)
        if any(value(before, key) != value(self.recipe, key) for key in RECOMPUTATION):
            return None
        return Recomputation(resolved.unrecomputed, resolved.kept)

    def recomputes_otherwise(self, plan: RunPlan) -> list[str]:
        """A line where `plan` could not take what was noted, though bits are strict."""
        now, before = Recomputation.of(plan.work), self.noted
        if now is None or before is None or now == before:
            return []
        return [
            f"numerics.bits: strict: {_in_words(before)} of the checkpoint cannot stay so here: now it is "
            f"{_in_words(now)}; on a GPU last bits may differ from here on"
        ]

    @property
    def resumed(self) -> int | None:
        """The step after which the run goes on; None for a run that begins."""
        return self.found.step if self.found is not None else None

    def told(self, started_over: bool) -> list[str]:
        """What there is to say about it; `started_over`: an unfinished run lies in the folder."""
        if self.found is not None:
            return [*self.notes, f"going on after step {self.step}, from {self.found.folder}"]
        if started_over and self.recipe.run.resume == "auto":
            lost = "an unfinished run lay here; it kept no checkpoint, so training starts at step 1"
            return [*self.notes, lost]
        return list(self.notes)


def _in_words(chosen: Recomputation) -> str:
    kept = sum(len(products) for _, products in chosen.kept)
    return f"{chosen.unrecomputed} un-recomputed layers and {kept} kept products"


def where_to_begin(
    comm: Communicator, recipe: Recipe, target: Target, splits: Splits, steps: int, teacher: str | None = None
) -> Start:
    """What run.resume asks for, if this run of `steps` steps may go on from it. Collective; errors on all ranks.
    `teacher`: the digest of one.

    Reads every byte of the checkpoint once, to verify it.
    """
    found, notes = find_checkpoint(comm, recipe)
    recipe = _settled(recipe, found)
    config = comm.broadcast_json(config_digest(recipe.model.path) if comm.rank == 0 else None)
    now = Origin(dump_recipe(recipe), splits.digest, base_of(comm, recipe, target), config, teacher)
    if found is None:
        return Start(recipe, now, None, tuple(notes))
    where = f"checkpoint {found.folder}"
    try:
        differences = require_same(_origin_of(found), now, where)
        require_steps_left(found.step, steps, where)
    except UserError as error:
        raise on_all_ranks(error) from None
    notes = [*notes, *found.notes, *(f"changed since the checkpoint: {line}" for line in differences)]
    return Start(recipe, now, found, tuple(notes))


def find_checkpoint(comm: Communicator, recipe: Recipe) -> tuple[FoundCheckpoint | None, list[str]]:
    """The checkpoint that run.resume asks for, and what there is to say. Collective; errors on all ranks."""
    asked = recipe.run.resume
    if asked == "never":
        return None, []
    if asked != "auto":
        return _named(comm, recipe, asked)
    survey, notes = _survey(comm, recipe)
    notes += [f"{step_name(s)} was never committed and does not count" for s in survey.unfinished]
    return survey.newest(), notes


def _origin_of(found: FoundCheckpoint) -> Origin:
    """What a checkpoint's run began with, its recipe with what was resolved then."""
    manifest = found.manifest
    recipe = _settled(_stored(found), found)
    asked = manifest.config, manifest.teacher
    return Origin(dump_recipe(recipe), manifest.data_digest, manifest.base, *asked)


def _stored(found: FoundCheckpoint) -> Recipe:
    return parse_stored(found.manifest.recipe, f"the recipe of {found.folder}")


def _settled(recipe: Recipe, found: FoundCheckpoint | None) -> Recipe:
    """The recipe with what affects bits in place of `auto`: as the run's first start resolved it.

    What the plan resolves stands beside the recipe in a checkpoint; before the first one it is `auto` still.
    """
    settled: dict[str, object] = {"numerics.attention": "pattern"}
    if found is not None:
        resolved = found.manifest.resolved
        settled = {
            "numerics.attention": _stored(found).numerics.attention,
            "batch.cells": resolved.cells,
            "memory.gradient_dtype": resolved.gradient_dtype,
        }
    return variant(recipe, {key: v for key, v in settled.items() if value(recipe, key) == "auto"})


def folder_of(recipe: Recipe, comm: Communicator) -> Path:
    """This rank's folder for checkpoints."""
    return checkpoint_folder(recipe, comm.rank, comm.hostname)


def checkpoint_folder(recipe: Recipe, rank: int, host: str) -> Path:
    """The folder for checkpoints of a rank on a host."""
    if recipe.run.checkpoints is None:
        return recipe.run.dir / "checkpoints"
    return _filled(str(recipe.run.checkpoints), rank, host)


def _survey(comm: Communicator, recipe: Recipe) -> tuple[CheckpointSearch, list[str]]:
    """What lies in the ranks' folders, and what there is to say about them. UserError for a link that leads nowhere,
    and where the folders of a run that has saved are gone.

    A machine may have got another name: where run.checkpoints names {host} and an unfinished run has no checkpoint
    under the present names, folders of other names count.
    """
    root = folder_of(recipe, comm)
    with together(comm):
        refuse_broken_link("run.checkpoints", root)
    survey = CheckpointSearch(comm, root)
    pattern = str(recipe.run.checkpoints)
    begun = comm.broadcast_json(os.path.exists(recipe.run.dir / "metrics.jsonl"))
    if survey.committed or not begun:
        return survey, []
    if "{host}" not in pattern:
        _refuse_missing(comm, recipe, root)
        return survey, []
    others = [path for path in _of_any_host(pattern, comm.rank) if path != root and steps_in(path)]
    former = others[comm.rank % len(others)] if others else root
    notes = (
        [f"{pattern} has no checkpoint under this machine's name: looking into {former}"] if others else []
    )
    return CheckpointSearch(comm, former), notes


def _refuse_missing(comm: Communicator, recipe: Recipe, root: Path) -> None:
    """UserError where run.checkpoints names folders that are on no machine, though the run has made steps and saved.

    A run makes them before its first step, so somebody removed them, or their disk is not there.
    """
    if recipe.run.checkpoints is None or any(comm.gather_json(os.path.lexists(root))):
        return
    with together(comm):
        if comm.rank == 0 and _has_saved(recipe.run.dir):
            raise UserError(
                f"run.checkpoints: {root} is not there, where the run in {recipe.run.dir} keeps its checkpoints; bring "
                "it back (is its disk mounted?), or begin anew with run.resume=never"
            )


def _has_saved(folder: Path) -> bool:
    """Whether the unfinished run in `folder` was asked for checkpoints and made a step."""
    try:
        before = parse_recipe((folder / "recipe.yaml").read_text(), str(folder / "recipe.yaml"))
        return before.run.save_every is not None and any("loss" in r for r in read_metrics(folder))
    except (OSError, UserError):
        return False


def _of_any_host(pattern: str, rank: int) -> list[Path]:
    """The folders that run.checkpoints names with any one word for {host}."""
    filled = Path(pattern.replace("{rank}", str(rank))).expanduser()
    fixed = next(parent for parent in filled.parents if "{host}" not in str(parent))
    rest = escape(str(filled.relative_to(fixed))).replace("{host}", "*")
    return sorted(path for path in fixed.glob(rest) if path.is_dir())


def _named(comm: Communicator, recipe: Recipe, asked: str) -> tuple[FoundCheckpoint, list[str]]:
    if asked.isascii() and asked.isdigit():
        survey, notes = _survey(comm, recipe)
        return survey.exactly(int(asked)), notes
    path = _filled(asked, comm.rank, comm.hostname)
    step = step_of(path.name)
    if step is None:
        raise on_all_ranks(
            UserError(
                f"run.resume: {asked}: expected auto, never, a step, or the path of a checkpoint, which ends in "
                f"{step_name(300)}"
            )
        )
    return CheckpointSearch(comm, path.parent).exactly(step), []


def _filled(path: str, rank: int, host: str) -> Path:
    filled = path.replace("{rank}", str(rank)).replace("{host}", host)
    return Path(filled).expanduser()


# ---- what it leaves


def open_saver(comm: Communicator, plan: RunPlan, store: ShardStore, start: Start) -> Saver:
    """What saves this run's checkpoints. Collective."""
    recipe, work = start.recipe, plan.work
    chosen = Recomputation.of(work)
    resolved = Resolved(
        cells=work.layout.cells,
        gradient_dtype=work.gradient_dtype,  # type: ignore[arg-type]
        unrecomputed=None if chosen is None else chosen.unrecomputed,
        kept=() if chosen is None else chosen.kept,
    )
    identity = Identity(start.origin, recipe.batch.global_size, recipe.run.seed, resolved, plan.shards)
    policy = Policy(recipe.run.keep_last, recipe.run.buddy)
    units = range(len(plan.shards.units))
    # Where units are updated in the backward, the last one is the first, and the root comes last of all.
    order = [*reversed(units[1:]), 0] if work.optimizer_in_backward else list(units)
    return Saver(comm, store, folder_of(recipe, comm), identity, policy, start.step, order)


def stopped(saver: Saver, step: int, reason: str) -> EmpireError:
    """How a run ends that was asked to stop after `step`, the same on all ranks."""
    if saver.newest == step:
        again = "the same command goes on from there"
        return on_all_ranks(StoppedError(f"stopped by {reason}: {step_name(step)} is saved; {again}"))
    kept = f"{step_name(saver.newest)} is the newest" if saver.newest else "there is none"
    return on_all_ranks(UnsavedError(f"stopped by {reason}: {step_name(step)} could not be saved; {kept}"))
