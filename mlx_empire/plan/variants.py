"""Recipes that differ from a given one in a few keys: what-if questions of the advice, the ladder and the daughters.

Values are set without the loader's checks, so that what is only planned can be asked about too; what is advised to
a person must be loadable and is written as they would type it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_empire.recipe.schema import Recipe

Changes = Mapping[str, Any]


def variant(recipe: Recipe, changes: Changes) -> Recipe:
    """`recipe` with `section.key` set for every item of `changes`."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, key = name.split(".")
        sections.setdefault(section, {})[key] = value
    copies = {s: getattr(recipe, s).model_copy(update=values) for s, values in sections.items()}
    return recipe.model_copy(update=copies)


def value(recipe: Recipe, name: str) -> Any:
    """The value of `section.key`."""
    section, key = name.split(".")
    return getattr(getattr(recipe, section), key)


def typed(changes: Changes) -> str:
    """The changes as overrides on a command line: `memory.zero_stage=3 optimizer.state_bits=8`."""
    return " ".join(f"{name}={_written(v)}" for name, v in changes.items())


def _written(v: Any) -> str:
    return str(v).lower() if isinstance(v, bool) else str(v)
