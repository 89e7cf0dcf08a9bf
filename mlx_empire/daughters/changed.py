"""Decides whether a finished daughter is still what its recipe and rows ask for, or has changed since.

The recipe and the digest of the rows, as tokens, lie in its folder since it began (`recipe.yaml`, `plan.json`). A
changed daughter is never passed off as done, and never trained again unasked: `run.resume=never` does that and replaces
its result, `run.accept_changes` keeps it. What leaves the result as it is (`recipe.changes.harmless`) is no change, but
for the run's length, which a finished one has come to the end of.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mlx_empire.daughters.jobs import is_finished, recipe_for
from mlx_empire.daughters.machine import single_target
from mlx_empire.errors import EmpireError
from mlx_empire.recipe.changes import changes, harmless
from mlx_empire.recipe.load import load_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.run.agree import load_data

# Where things lie; what is found there is compared by digest.
_PLACES = ("run.dir", "data.path", "model.path")
_LENGTH = "run.steps"


def changed(recipe: Recipe, people: Path, names: Sequence[str]) -> dict[str, str]:
    """The finished ones among `names` that have changed, each with what is other than it was."""
    finished = [name for name in names if is_finished(recipe, name)]
    if not finished:
        return {}
    spec = single_target(recipe).spec
    found = {}
    for name in finished:
        own = recipe_for(recipe, people, name)
        accepted = own.run.accept_changes
        try:
            told = _recipe_differs(own, accepted)
            if not any(key.startswith("data.") for key in accepted):
                began_with = json.loads((own.run.dir / "plan.json").read_text())["data_digest"]
                if load_data(own, spec).digest != began_with:
                    told.append(f"{own.data.path} holds other rows")
        except (EmpireError, OSError, ValueError, KeyError, TypeError):
            continue  # what cannot be compared, such as rows that were moved away once learnt, is no new work
        if told:
            found[name] = "; ".join(told)
    return found


def _recipe_differs(own: Recipe, accepted: Sequence[str]) -> list[str]:
    before = load_recipe(own.run.dir / "recipe.yaml")
    return [
        f"{key}: {a} -> {b}"
        for key, (a, b) in changes(before, own).items()
        if key not in (*_PLACES, *accepted) and (key == _LENGTH or not harmless(key, before, own))
    ]
