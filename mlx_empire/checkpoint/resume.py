"""Where a run goes on: the checkpoint that the recipe asks for, and whether the recipe may go on from it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from mlx_empire.checkpoint.names import broken_link, step_name, step_of, steps_in
from mlx_empire.checkpoint.survey import Found, Survey
from mlx_empire.comm.failure import together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.errors import UserError, on_all_ranks
from mlx_empire.recipe.changes import require_acceptable
from mlx_empire.recipe.load import parse_recipe
from mlx_empire.recipe.schema import Recipe

DATA, MODEL = "data.path", "model.path"  # may be spelled in another way where the same is found there


@dataclass(frozen=True)
class Start:
    """How a run begins: `recipe` with what an earlier start resolved, `found` to go on from (None: step 1).

    `data`, `base` and `config` identify what is not in a checkpoint: the rows, the frozen weights and the model's
    configuration, where there are any.
    """

    recipe: Recipe
    found: Found | None
    notes: tuple[str, ...]
    data: str = ""
    base: str | None = None
    config: str | None = None

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.found.step if self.found is not None else 0

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


def folder_of(recipe: Recipe, comm: Communicator) -> Path:
    """This rank's folder for checkpoints."""
    if recipe.run.checkpoints is None:
        return recipe.run.dir / "checkpoints"
    return _filled(str(recipe.run.checkpoints), comm)


def find_start(comm: Communicator, recipe: Recipe) -> Start:
    """What run.resume asks for. Reads every byte of the checkpoint once, to verify it. Collective; errors on all."""
    asked = recipe.run.resume
    if asked == "never":
        return Start(recipe, None, ())
    if asked == "auto":
        survey, notes = _survey(comm, recipe)
        found = survey.newest()
        notes += [f"{step_name(s)} was never committed and does not count" for s in survey.unfinished]
    else:
        found, notes = _named(comm, recipe, asked)
    if found is None:
        return Start(recipe, None, tuple(notes))
    try:
        resolved, differences = _reconcile(recipe, found)
    except UserError as error:
        raise on_all_ranks(error) from None
    notes = [*notes, *found.notes, *(f"changed since the checkpoint: {line}" for line in differences)]
    return Start(resolved, found, tuple(notes))


def require_same(start: Start) -> None:
    """UserError unless rows, frozen weights and configuration are the checkpoint's, or their change was accepted.

    Where they lie does not matter.
    """
    found, recipe = start.found, start.recipe
    if found is None:
        return
    accepted = recipe.run.accept_changes
    name = f"checkpoint {found.folder}"
    if found.manifest.data_digest != start.data and not accepts(accepted, "data"):
        raise on_all_ranks(
            UserError(
                f"{name}: data.path: {recipe.data.path} holds other rows than the run began with; bring them back, or "
                "add run.accept_changes=[data.path]"
            )
        )
    configured = found.manifest.config in (None, start.config)
    if (found.manifest.base != start.base or not configured) and not accepts(accepted, "model"):
        other = "other weights" if configured else "another config.json"
        raise on_all_ranks(
            UserError(
                f"{name}: model.path: {recipe.model.path} holds {other} than the run began with; bring back what was "
                "there, or add run.accept_changes=[model.path]"
            )
        )


def require_steps_left(start: Start, steps: int) -> None:
    """UserError where the checkpoint is later than the run's end."""
    found = start.found
    if found is not None and found.step > steps:
        raise on_all_ranks(
            UserError(
                f"run.steps: {steps}: the checkpoint {found.folder} is of step {found.step} already; "
                f"choose run.steps of at least {found.step}, or another run.dir"
            )
        )


def accepts(accepted: Sequence[str], section: str) -> bool:
    """Whether run.accept_changes names a key of this section."""
    return any(key.startswith(f"{section}.") for key in accepted)


def _survey(comm: Communicator, recipe: Recipe) -> tuple[Survey, list[str]]:
    """What lies in the ranks' folders, and what there is to say about them. UserError for a link that leads nowhere.

    A machine may have got another name: where run.checkpoints names {host} and an unfinished run has no checkpoint
    under the present names, folders of other names count.
    """
    root = folder_of(recipe, comm)
    with together(comm):
        _refuse_broken_link(root)
    survey = Survey(comm, root)
    pattern = str(recipe.run.checkpoints)
    begun = comm.broadcast_json(os.path.exists(recipe.run.dir / "metrics.jsonl"))
    if survey.committed or not begun or "{host}" not in pattern:
        return survey, []
    others = [path for path in _of_any_host(pattern, comm.rank) if path != root and steps_in(path)]
    former = others[comm.rank % len(others)] if others else root
    notes = (
        [f"{pattern} has no checkpoint under this machine's name: looking into {former}"] if others else []
    )
    return Survey(comm, former), notes


def _of_any_host(pattern: str, rank: int) -> list[Path]:
    """The folders that run.checkpoints names with any one word for {host}."""
    filled = Path(pattern.replace("{rank}", str(rank))).expanduser()
    fixed = next(parent for parent in filled.parents if "{host}" not in str(parent))
    rest = escape(str(filled.relative_to(fixed))).replace("{host}", "*")
    return sorted(path for path in fixed.glob(rest) if path.is_dir())


def _refuse_broken_link(folder: Path) -> None:
    link = broken_link(folder)
    if link is not None:
        raise UserError(
            f"run.checkpoints: {folder}: {link} is a link to {link.readlink()}, which is not there; bring it back "
            "(is its disk mounted?), or remove the link"
        )


def _named(comm: Communicator, recipe: Recipe, asked: str) -> tuple[Found, list[str]]:
    if asked.isascii() and asked.isdigit():
        survey, notes = _survey(comm, recipe)
        return survey.exactly(int(asked)), notes
    path = _filled(asked, comm)
    step = step_of(path.name)
    if step is None:
        raise on_all_ranks(
            UserError(
                f"run.resume: {asked}: expected auto, never, a step, or the path of a checkpoint, which ends in "
                f"{step_name(300)}"
            )
        )
    return Survey(comm, path.parent).exactly(step), []


def _filled(path: str, comm: Communicator) -> Path:
    filled = path.replace("{rank}", str(comm.rank)).replace("{host}", comm.hostname)
    return Path(filled).expanduser()


def _reconcile(recipe: Recipe, found: Found) -> tuple[Recipe, list[str]]:
    """The recipe with what the first start resolved, and how it differs; UserError for what may not."""
    resolved = found.manifest.resolved
    before = parse_recipe(found.manifest.recipe, f"the recipe of {found.folder}")

    def settled(one: Recipe) -> Recipe:
        batch, memory = one.batch, one.memory
        if batch.cells == "auto":
            batch = batch.model_copy(update={"cells": resolved.cells})
        if memory.gradient_dtype == "auto":
            memory = memory.model_copy(update={"gradient_dtype": resolved.gradient_dtype})
        return one.model_copy(update={"batch": batch, "memory": memory})

    now = settled(recipe)
    by_digest = [DATA, *([MODEL] if found.manifest.config is not None else [])]
    accepted = [*recipe.run.accept_changes, *by_digest]  # `require_same` looks at what is there
    return now, require_acceptable(settled(before), now, accepted, f"checkpoint {found.folder}")
