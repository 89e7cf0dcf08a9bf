"""One model under pure training, then with each technique added: what a node needs, and what each rung unlocks.

Decides the order of the rungs and what each sets. A rung keeps everything below it. `largest` are the largest
trainable models of the catalog that fit at that rung on the same nodes, one dense and one mixture of experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_empire.cluster.hostfile import Node
from mlx_empire.model.closed_forms import active_parameters
from mlx_empire.model.spec import ModelSpec
from mlx_empire.model.target import in_dtype
from mlx_empire.plan.assess import Assessment, assess
from mlx_empire.plan.optimizer_bytes import StatesOf
from mlx_empire.recipe.changes import EVERY_WEIGHT, variant
from mlx_empire.recipe.schema import Recipe

RUNGS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    (
        "pure training in float32",
        {
            "model.dtype": "float32",
            "memory.gradient_checkpointing": False,
            "memory.zero_stage": 0,
            "memory.shares": "equal",
            "memory.gradient_dtype": "float32",
            "optimizer.state_bits": 32,
            "optimizer.master_weights": "exact",
            "optimizer.in_backward": False,
        },
    ),
    ("+ gradient checkpointing", {"memory.gradient_checkpointing": True}),
    ("+ bfloat16 with exact masters", {"model.dtype": "bfloat16", "memory.gradient_dtype": "bfloat16"}),
    ("+ 8-bit optimizer states", {"optimizer.state_bits": 8}),
    ("+ ZeRO-1: optimizer divided", {"memory.zero_stage": 1}),
    ("+ ZeRO-2: gradients divided", {"memory.zero_stage": 2}),
    ("+ ZeRO-3: weights divided", {"memory.zero_stage": 3}),
    ("+ shares by free memory", {"memory.shares": "memory"}),
    ("+ gradient release", {"optimizer.in_backward": True}),
)


# What a recipe is changed to where models that a rung may unlock are described.
UNLOCKED: Mapping[str, Any] = {"model.dtype": "bfloat16", **EVERY_WEIGHT}


@dataclass(frozen=True)
class Rung:
    """A technique added to those above it. `dense` and `moe`: (catalog name, parameters) of the largest that fit."""

    name: str
    assessment: Assessment
    dense: tuple[str, int] | None
    moe: tuple[str, int] | None


def ladder(
    recipe: Recipe,
    spec: ModelSpec,
    nodes: Sequence[Node],
    models: Iterable[ModelSpec],
    states_of: StatesOf,
) -> list[Rung]:
    """The rungs for `spec` on `nodes`; `models` are those that a rung may unlock, described as `UNLOCKED` says."""
    ranked = sorted(models, key=lambda m: -m.base_parameters)
    rungs: list[Rung] = []
    settings: dict[str, Any] = {}
    for name, changes in RUNGS:
        settings |= changes
        rungs.append(_rung(name, variant(recipe, settings), spec, nodes, ranked, states_of))
    return rungs


def _rung(
    name: str,
    recipe: Recipe,
    spec: ModelSpec,
    nodes: Sequence[Node],
    ranked: Sequence[ModelSpec],
    states_of: StatesOf,
) -> Rung:
    dtype = str(recipe.model.dtype)

    def attempt(one: ModelSpec) -> Assessment:
        return assess(recipe, in_dtype(one, dtype), nodes, states_of)

    def largest(*, mixture: bool) -> tuple[str, int] | None:
        kind = [m for m in ranked if (active_parameters(m) < m.base_parameters) == mixture]
        for one in kind:
            if _may_fit(one, recipe, nodes) and attempt(one).verdict != "no":
                return one.name, one.base_parameters
        return None

    return Rung(name, attempt(spec), largest(mixture=False), largest(mixture=True))


def _may_fit(spec: ModelSpec, recipe: Recipe, nodes: Sequence[Node]) -> bool:
    """Whether the weights alone leave room: spares most of the plans of models that are much too large."""
    item = 4 if recipe.model.dtype == "float32" else 2
    weights = item * spec.base_parameters
    if recipe.memory.zero_stage == 3:
        return weights <= sum(n.limit_bytes for n in nodes)
    return weights <= min(n.limit_bytes for n in nodes)
