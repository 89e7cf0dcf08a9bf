"""Decides what a recipe that is only planned asks for beyond what the trainer can do today."""

from __future__ import annotations

from mlx_empire.recipe.explain import leaf_fields
from mlx_empire.recipe.schema import BuiltToday, Recipe


def not_built(recipe: Recipe) -> dict[str, str]:
    """Key -> value as written, for every value of `recipe` that the trainer would refuse, in the schema's order."""
    found = {}
    for name, info in leaf_fields().items():
        section, key = name.split(".")
        value = getattr(getattr(recipe, section), key)
        markers = [m for m in info.metadata if isinstance(m, BuiltToday)]
        if any(value not in marker.values for marker in markers):
            found[name] = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return found
