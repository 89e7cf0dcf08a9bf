"""The manifest of a checkpoint, with made-up figures where nobody asks for others."""

from __future__ import annotations

from typing import Any

from mlx_empire.checkpoint.manifest import Manifest, Resolved, digest_of


def manifest_of(recipe: str = "", **fields: Any) -> Manifest:
    """Of step 7 of a run with `recipe`; `fields` are those of `Manifest`."""
    usual: dict[str, Any] = {
        "format": 1,
        "step": 7,
        "written_by": {},
        "recipe": recipe,
        "recipe_digest": digest_of(recipe.encode()),
        "data_digest": "rows",
        "next_row": 28,
        "seed": 0,
        "base": None,
        "resolved": Resolved(cells=2, gradient_dtype="float32"),
        "numerics": {},
        "zero_stage": 3,
        "shares": (1.0,),
        "shards": (),
    }
    return Manifest(**(usual | fields))
