"""One change to an assessment, assessed: the questions that advice, ladder and daughters ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_empire.cluster.hostfile import Node
from mlx_empire.plan.assess import VERDICTS, Assessment, assess
from mlx_empire.plan.resolve import never_fits
from mlx_empire.recipe.changes import variant
from mlx_empire.recipe.explain import leaf_fields
from mlx_empire.recipe.schema import Recipe
from mlx_empire.sizes import amount

Settings = dict[str, Any]


AS_IT_IS = "as it is"  # the change that nothing is better than


@dataclass(frozen=True)
class Advice:
    """One change as a user would type or buy it, what it does in one sentence with figures, and the verdict then."""

    change: str
    effect: str
    verdict: str

    @property
    def is_settings(self) -> bool:
        """Whether the change is settings of the recipe and nothing else: words that may follow a command."""
        names = (word.partition("=") for word in self.change.split())
        return all(equals and name in leaf_fields() for name, equals, _ in names)


def with_settings(
    assessment: Assessment, settings: Settings, nodes: Sequence[Node] | None = None
) -> Assessment:
    """The assessment with other settings, perhaps on other nodes."""
    recipe = variant(assessment.recipe, _consistent(assessment.recipe, settings))
    others = nodes or [n.node for n in assessment.nodes]
    return assess(recipe, assessment.spec, others, assessment.states_of)


def with_least_memory(
    assessment: Assessment, settings: Settings, nodes: Sequence[Node] | None = None
) -> Assessment:
    """`with_settings`, and whatever is `auto` then as the choice that needs least.

    What this fits, `auto` fits too, and it is one plan to make instead of many. (Only a model of a few layers may fit
    at a lower stage and not at 3, which gathers two layers beside the shards.)
    """
    recipe = variant(assessment.recipe, settings)
    memory, spec = recipe.memory, assessment.spec
    count = len(nodes or assessment.nodes)
    least: Settings = {}
    if memory.gradient_checkpointing == "auto":
        least["memory.gradient_checkpointing"] = True
    if memory.zero_stage == "auto":
        least["memory.zero_stage"] = 3 if count > 1 else 2
    if memory.gradient_dtype == "auto" and spec.dtype == "bfloat16":
        least["memory.gradient_dtype"] = "bfloat16"
    return with_settings(assessment, {**settings, **least}, nodes)


def hopeless(assessment: Assessment, settings: Settings, nodes: Sequence[Node] | None = None) -> bool:
    """Whether nothing else can make it fit with such settings: weights and states alone are too much."""
    states = assessment.states_of(
        variant(assessment.recipe, _consistent(assessment.recipe, settings)).optimizer
    )
    return never_fits(assessment.spec, nodes or [n.node for n in assessment.nodes], states)


def fits_at_least(assessment: Assessment, settings: Settings, nodes: Sequence[Node] | None = None) -> bool:
    """Whether `with_least_memory` fits."""
    return not hopeless(assessment, settings, nodes) and fits(with_least_memory(assessment, settings, nodes))


def fits(assessment: Assessment) -> bool:
    """Whether it can run, with whatever room."""
    return assessment.verdict != "no"


def as_good(other: Assessment, than: Assessment) -> bool:
    """Whether `other` has no worse a verdict."""
    return VERDICTS.index(other.verdict) <= VERDICTS.index(than.verdict)


def fullest_node(assessment: Assessment) -> str:
    """`soldier-1 is fullest: 183 GiB of 208 GiB, 12 % left`."""
    worst = assessment.worst
    left = 100 * worst.headroom_bytes / max(worst.limit_bytes, 1)
    where = f"{worst.node.name} is fullest: " if len(assessment.nodes) > 1 else ""
    return f"{where}{amount(worst.peak_bytes)} of {amount(worst.limit_bytes)}, {left:.0f} % left"


def _consistent(recipe: Recipe, settings: Settings) -> Settings:
    """`settings` and what follows from them: cells cannot outnumber the micro-batches of a step."""
    size = settings.get("batch.global_size", recipe.batch.global_size)
    micro = settings.get("batch.micro_size", recipe.batch.micro_size)
    cells = recipe.batch.cells
    return (
        {**settings, "batch.cells": "auto"} if isinstance(cells, int) and cells > size // micro else settings
    )
