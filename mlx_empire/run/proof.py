"""The proof, before each run and each look at losses, that the model scaled down can be streamed; rank 0 makes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from mlx_empire.comm.failure import together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.engine.streamable import verify_scaled_down
from mlx_empire.model.spec import RootNames
from mlx_empire.model.target import Target
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.console import print_line, said_if_slow

VERIFYING = (
    "verifying on the model scaled down that layer by layer it has the whole model's loss and gradients "
    "(slower where layers go position by position, as state-space layers do)"
)


def share_proof(
    comm: Communicator,
    recipe: Recipe,
    config: Mapping[str, Any],
    target: Target,
    *,
    keeps: bool = False,
    say: Callable[[str], None] = print_line,
) -> Target:
    """The target with the root's names as the proof shows them. Collective.

    `keeps`: the run may keep products of recomputed layers. `say` tells a person what takes long. UserError where the
    model cannot be streamed.
    """
    name, shown = str(recipe.model.path), None
    with together(comm):
        if comm.rank == 0:
            with said_if_slow(f"{name}: {VERIFYING}", say=say):
                numerics = recipe.numerics
                found = verify_scaled_down(
                    config,
                    name,
                    by_pattern=numerics.attention != "mask",
                    keeps=keeps,
                    compiles=numerics.compiled_layers,
                    packs=recipe.data.packing,
                )
                shown = asdict(found)
    names = RootNames(**comm.broadcast_json(shown))
    return replace(target, spec=replace(target.spec, root_names=names))
