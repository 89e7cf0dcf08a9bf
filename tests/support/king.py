"""A small recipe as a run on one machine, king.local, asks for it."""

from __future__ import annotations

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.recipe.load import parse_recipe
from mlx_empire.recipe.schema import Recipe

TEXT = """\
model: {path: m}
data: {path: d, sequence_length: 8}
batch: {global_size: 4}
optimizer: {learning_rate: 1e-3}
run: {dir: r, steps: 10}
"""
COMM = SoloCommunicator("king.local")


def recipe(*overrides: str) -> Recipe:
    """The recipe with changes."""
    return parse_recipe(TEXT, "x.yaml", overrides)
