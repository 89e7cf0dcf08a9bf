"""The recipe that is taken where a run has missed its gate: `evaluation.fallback`.

Whether one is due is read off the run's folder: it is complete, and its result is not frozen, which is what a gate that
is reached does. So the command that was killed after the first run, given again, goes on with the fallback, and the
launcher and a run without one see the same. A fallback may have a fallback of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from mlx_empire.errors import UserError
from mlx_empire.formats.seal import is_sealed
from mlx_empire.recipe.load import load_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.run.launched import COMPLETE
from mlx_empire.run.names import FINAL


def fallback_due(recipe: Recipe) -> Path | None:
    """The recipe to go on with, because the run of this one is over and missed its gate; else None."""
    folder, other = recipe.run.dir, recipe.evaluation.fallback
    missed = (folder / COMPLETE).exists() and not is_sealed(folder / FINAL)
    return other if missed else None


def refuse_fallback(recipe: Recipe) -> None:
    """UserError for a fallback that could not be taken, said before the first step of the run that may miss."""
    folders = {_place(recipe.run.dir)}
    for path, other in fallbacks_of(recipe):
        if _place(other.run.dir) in folders:
            raise UserError(
                f"evaluation.fallback: {path}: its run.dir {other.run.dir} is that of the run that it would follow; "
                "give it another"
            )
        folders.add(_place(other.run.dir))


def _place(folder: Path) -> str:
    """Where a folder lies, however it is spelt; letter case does not tell two apart on a Mac."""
    real = os.path.realpath(folder)
    return real.casefold() if sys.platform == "darwin" else real


def fallbacks_of(recipe: Recipe) -> Iterator[tuple[Path, Recipe]]:
    """A recipe's fallback, that one's own, and so on; without end where two name each other (`refuse_fallback`)."""
    while (path := recipe.evaluation.fallback) is not None:
        recipe = load_recipe(path)
        yield path, recipe


def fallback_taken(recipe: Recipe, other: Path) -> str:
    """What a person is told when the fallback is taken."""
    return f"{recipe.run.dir}: its gate was not reached, so evaluation.fallback is taken: {other}"
