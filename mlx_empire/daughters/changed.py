"""Decides whether a finished daughter is still what its recipe, base and rows ask for, or has changed since.

The recipe, the digest of the base's weights and that of the rows, as tokens, lie in its folder since it began
(`recipe.yaml`, `plan.json`). A changed daughter is never passed off as done, and never trained again unasked:
`run.resume=never` does that and replaces its result, `run.accept_changes` keeps it, `--watch` goes on from it. What
leaves the result as it is (`recipe.changes.harmless`) is no change, but for the run's length, which a finished one has
come to the end of. Of one with generations the newest counts: rows that it was offered are no new ones, learnt or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mlx_empire.checkpoint.manifest import sampled_digest
from mlx_empire.daughters.generations import Generations
from mlx_empire.daughters.jobs import is_finished, recipe_for
from mlx_empire.daughters.machine import single_target
from mlx_empire.daughters.rows import rows_of
from mlx_empire.errors import EmpireError
from mlx_empire.model.spec import ModelSpec
from mlx_empire.recipe.changes import changes, harmless
from mlx_empire.recipe.load import load_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.run.names import RECIPE, plan_of
from mlx_empire.run.shared_rows import load_data

# Where things lie; what is found there is compared by digest. A later generation has rows and a start of its own.
_PLACES = ("run.dir", "data.path", "model.path")
_OF_LATER = ("data.validation_split", "tuning.start")
_LENGTH = "run.steps"


def changed(recipe: Recipe, people: Path, names: Sequence[str]) -> dict[str, str]:
    """The finished ones among `names` that have changed, each with what is other than it was."""
    finished = [name for name in names if is_finished(recipe, name)]
    if not finished:
        return {}
    spec, base = single_target(recipe).spec, sampled_digest(recipe.model.path)
    found = {}
    for name in finished:
        own = recipe_for(recipe, people, name)
        if told := _told(own, Generations(own.run.dir), spec, base):
            found[name] = "; ".join(told)
    return found


def recipe_differs(own: Recipe, generations: Generations) -> list[str]:
    """What a finished daughter's recipe asks for otherwise than the one by which its newest generation was trained."""
    newest = max(generations.finished)
    accepted = (*_PLACES, *own.run.accept_changes, *(_OF_LATER if newest > 1 else ()))
    with suppress(EmpireError, OSError):  # what cannot be compared is no new work
        before = load_recipe(generations.place(newest) / RECIPE)
        return [
            f"{key}: {a} -> {b}"
            for key, (a, b) in changes(before, own).items()
            if key not in accepted and (key == _LENGTH or not harmless(key, before, own))
        ]
    return []


def rows_differ(own: Recipe, spec: ModelSpec | None = None) -> bool:
    """Whether data.path holds other rows, as tokens, than the run in run.dir began with; where that is not noted, no.
    UserError, OSError.
    """
    began_with = plan_of(own.run.dir).get("data_digest")
    return began_with is not None and load_data(own, spec or single_target(own).spec).digest != began_with


def _told(own: Recipe, generations: Generations, spec: ModelSpec, base: str) -> list[str]:
    accepted, newest = own.run.accept_changes, max(generations.finished)
    told = recipe_differs(own, generations)
    if generations.result(newest).base_differs(base) and not any(
        key.startswith("model.") for key in accepted
    ):
        told.append(f"{own.model.path} holds other weights")
    if any(key.startswith("data.") for key in accepted):
        return told
    learnt = generations.learnt(newest) if newest > 1 else None
    with suppress(EmpireError, OSError):  # rows that were moved away once learnt are no new work
        if rows_of(own.data).digest != learnt.offered if learnt is not None else rows_differ(own, spec):
            told.append(f"{own.data.path} holds other rows")
    return told
