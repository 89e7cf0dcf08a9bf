"""Where a run goes on: the checkpoint that the recipe asks for, and whether the recipe may go on from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_empire.checkpoint.names import step_name, step_of
from mlx_empire.checkpoint.survey import Found, Survey
from mlx_empire.comm.protocol import Communicator
from mlx_empire.errors import UserError, on_all_ranks
from mlx_empire.recipe.changes import require_acceptable
from mlx_empire.recipe.load import parse_recipe
from mlx_empire.recipe.schema import Recipe


@dataclass(frozen=True)
class Start:
    """How a run begins: `recipe` with what an earlier start resolved, `found` to go on from (None: step 1).

    `data` and `base` identify what is not in a checkpoint: the rows and, where there are any, the frozen weights.
    """

    recipe: Recipe
    found: Found | None
    notes: tuple[str, ...]
    data: str = ""
    base: str | None = None

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
        survey = Survey(comm, folder_of(recipe, comm))
        found = survey.newest()
        notes = [f"{step_name(s)} was never committed and does not count" for s in survey.unfinished]
    else:
        found = _named(comm, recipe, asked)
        notes = []
    if found is None:
        return Start(recipe, None, tuple(notes))
    try:
        resolved, differences = _reconcile(recipe, found)
    except UserError as error:
        raise on_all_ranks(error) from None
    notes = [*notes, *found.notes, *(f"changed since the checkpoint: {line}" for line in differences)]
    return Start(resolved, found, tuple(notes))


def require_same(start: Start) -> None:
    """UserError unless data and frozen weights are those of the checkpoint, or their change was accepted."""
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
    if found.manifest.base != start.base and not accepts(accepted, "model"):
        raise on_all_ranks(
            UserError(
                f"{name}: model.path: {recipe.model.path} holds other weights than the run began with; bring them "
                "back, or add run.accept_changes=[model.path]"
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


def _named(comm: Communicator, recipe: Recipe, asked: str) -> Found:
    if asked.isascii() and asked.isdigit():
        return Survey(comm, folder_of(recipe, comm)).exactly(int(asked))
    path = _filled(asked, comm)
    step = step_of(path.name)
    if step is None:
        raise on_all_ranks(
            UserError(
                f"run.resume: {asked}: expected auto, never, a step, or the path of a checkpoint, which ends in "
                f"{step_name(300)}"
            )
        )
    return Survey(comm, path.parent).exactly(step)


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
    lines = require_acceptable(settled(before), now, recipe.run.accept_changes, f"checkpoint {found.folder}")
    return now, lines
