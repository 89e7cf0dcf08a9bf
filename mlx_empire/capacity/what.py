"""`capacity --what --hosts HOSTFILE`: what these machines can train, how, how long it takes and what it costs.

Decides the ways that are tried for a model, the one that changes most first (all weights, adapters at 16 bits, adapters
over a base packed to 4 bits), in steps of 8 rows of 2,048 with the other settings of `recipes/scout.yaml`; how long a
run is (`--tokens`); and what it costs: power, and its part of the machines' price. The largest models are scaled from
a known shape. Settings that are asked for (`optimizer.state_bits=8`) hold in every way and for the largest models; one
of `tuning` takes the place of the three ways.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from mlx_empire.capacity.document import Document
from mlx_empire.capacity.text import plain_table, verdict_text
from mlx_empire.cluster.hostfile import Node
from mlx_empire.errors import UserError
from mlx_empire.model import catalog
from mlx_empire.model.target import catalog_target, shaped_target
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.assess import Assessment, assess
from mlx_empire.plan.chips import Range, no_time
from mlx_empire.plan.hardware import wire_of
from mlx_empire.plan.largest import DENSE, MIXTURE, Largest, largest
from mlx_empire.plan.pace import Pace, pace_of, run_dollars
from mlx_empire.plan.resolve import never_fits
from mlx_empire.recipe.changes import EVERY_WEIGHT, variant
from mlx_empire.recipe.load import load_recipe
from mlx_empire.recipe.packaged import recipe_file
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.text import billions, run_length, span

WAYS: Mapping[str, Mapping[str, Any]] = {
    "all weights": EVERY_WEIGHT,
    "adapters": {"tuning.type": "lora", "tuning.rank": 16},
    "adapters, 4-bit base": {"tuning.type": "qlora", "tuning.rank": 16, "tuning.bits": 4},
}
AS_ASKED: Mapping[str, Mapping[str, Any]] = {"as asked": {}}
ROWS, POSITIONS = 8, 2048  # of a step: few, so that small machines are not refused for long steps
_HOURS = {"h": 1.0, "d": 24.0, "w": 168.0}


@dataclass(frozen=True)
class Trainable:
    """A catalog model and the first way in which the machines train it: None where there is none.

    `pace` is None where a chip is not known, `dollars` (power and wear) also where a machine's price is not.
    `within`: whether it keeps `--deadline` and `--budget` at worst; None where nothing was asked or it is not known.
    `why`: what else than memory stands against it, where something does.
    """

    model: str
    parameters: int
    way: str | None
    settings: Mapping[str, Any] | None
    assessment: Assessment | None
    pace: Pace | None
    dollars: Range | None
    within: bool | None
    why: str | None = None


@dataclass(frozen=True)
class WhatSurvey:
    """What machines train: by model, and the largest that they train whole by kind (empty where one model was asked
    for, or how they are tuned). `no_time`: why no times."""

    rows: Sequence[Trainable]
    largest: Mapping[str, Largest | None]
    tokens: int
    no_time: str | None


def hours_of(written: str) -> float:
    """Hours of `36h`, `7d` or `2w`. UserError."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)([hdw])", written)
    if match is None or float(match[1]) <= 0:
        raise UserError(f"--deadline {written[:40]}: write it as 36h, 7d or 2w")
    return float(match[1]) * _HOURS[match[2]]


def what(
    nodes: Sequence[Node],
    names: Sequence[str],
    tokens: int,
    deadline: float | None,
    budget: float | None,
    asked: Sequence[str] = (),
) -> WhatSurvey:
    """What `nodes` train of the models `names`; `deadline` in hours, `budget` in dollars, None where not asked; what
    settings are `asked` as on a command line. UserError for those that cannot be."""
    plain = (f"batch.global_size={max(ROWS, len(nodes))}", f"data.sequence_length={POSITIONS}")
    recipe = load_recipe(recipe_file("scout"), (*plain, *asked))
    steps = max(-(-tokens // (recipe.batch.global_size * recipe.data.sequence_length)), 1)
    recipe = load_recipe(recipe_file("scout"), (*plain, *asked, f"run.steps={steps}"))
    keys = {setting.partition("=")[0].strip() for setting in asked}
    tuned = any(key.startswith("tuning.") for key in keys)
    ways = AS_ASKED if tuned else WAYS
    unknown = no_time(nodes)
    rows = [
        _row(name, recipe, ways, nodes, known=unknown is None, limits=(deadline, budget)) for name in names
    ]
    rows.sort(key=lambda row: (list(ways).index(row.way) if row.way else len(ways), -row.parameters))
    whole = len(names) == len(catalog.names()) and not tuned
    kinds = {"dense": DENSE, "mixture": MIXTURE} if whole else {}
    sizes = {kind: _largest(name, recipe, nodes, keys) for kind, name in kinds.items()}
    return WhatSurvey(rows, sizes, tokens, unknown)


def _row(
    name: str,
    recipe: Recipe,
    ways: Mapping[str, Mapping[str, Any]],
    nodes: Sequence[Node],
    *,
    known: bool,
    limits: tuple[float | None, float | None],
) -> Trainable:
    size, why = 0, None
    for way, settings in ways.items():
        tuned = variant(recipe, dict(settings))
        target = catalog_target(name, tuned)
        size = target.base_parameters
        why = target.not_trainable
        if why or never_fits(target.spec, nodes, state_bytes_of(tuned.optimizer)):
            continue
        found = assess(tuned, target.spec, nodes, state_bytes_of)
        if found.verdict == "no":
            continue
        pace = pace_of(found, wire_of(nodes)) if known else None
        dollars = run_dollars(nodes, pace) if pace else None
        return Trainable(name, size, way, settings, found, pace, dollars, _within(pace, dollars, *limits))
    return Trainable(name, size, None, None, None, None, None, None, why)


def _within(
    pace: Pace | None, dollars: Range | None, deadline: float | None, budget: float | None
) -> bool | None:
    asked = [(pace.run_hours if pace else None, deadline), (dollars, budget)]
    limited = [(value, limit) for value, limit in asked if limit is not None]
    if not limited or any(value is None for value, _ in limited):
        return None
    return all(value is not None and value[1] <= limit for value, limit in limited)


def _largest(name: str, recipe: Recipe, nodes: Sequence[Node], asked: Collection[str]) -> Largest | None:
    """The largest model of a shape that is trained whole, with whatever saves memory and is not `asked` otherwise."""
    least: dict[str, Any] = {
        "memory.gradient_checkpointing": True,
        "memory.zero_stage": 3 if len(nodes) > 1 else "auto",
        "memory.gradient_dtype": "bfloat16",
    }
    saving = variant(recipe, {key: value for key, value in least.items() if key not in asked})
    config, _ = catalog.load(name)
    return largest(saving, config, lambda one: shaped_target(one, name, saving).spec, nodes, state_bytes_of)


def what_document(survey: WhatSurvey) -> Document:
    """The survey as JSON; hours and dollars as [low, high]."""
    return {
        "tokens": survey.tokens,
        "no_time": survey.no_time,
        "largest": {kind: _largest_document(found) for kind, found in survey.largest.items()},
        "models": [
            {
                "model": row.model,
                "parameters": row.parameters,
                "way": row.way,
                "settings": None if row.settings is None else dict(row.settings),
                "verdict": row.assessment.verdict if row.assessment else "no",
                "zero_stage": row.assessment.zero_stage if row.assessment else None,
                "run_hours": row.pace and sorted(row.pace.run_hours),
                "dollars": row.dollars and sorted(row.dollars),
                "within": row.within,
                "why": row.why,
            }
            for row in survey.rows
        ],
    }


def _largest_document(found: Largest | None) -> Document | None:
    if found is None:
        return None
    return {"parameters": found.parameters, "layers": found.layers, "heads": found.heads}


def print_what(survey: WhatSurvey, console: Console) -> None:
    """A row per model, and the largest of each kind."""
    table = plain_table(f"what these machines train, with a run of {survey.tokens:,} tokens")
    for title in ("model", "parameters", "how", "", "hours", "power and wear", "asked"):
        table.add_column(title, overflow="fold")
    for row in survey.rows:
        table.add_row(row.model, billions(row.parameters), row.way or "-", *_cells(row))
    console.print(table)
    for row in survey.rows:
        if row.why:
            console.print(f"{row.model}: {row.why}")
    for kind, found in survey.largest.items():
        console.print(f"the largest {kind} model that they train whole: {_spelled(found)}")
    if survey.no_time:
        console.print(survey.no_time)


def _cells(row: Trainable) -> Iterator[Any]:
    yield verdict_text(row.assessment.verdict if row.assessment else "no")
    yield run_length(row.pace.run_hours) if row.pace else "?" if row.way else "-"
    yield span(row.dollars, " $") if row.dollars else "?" if row.way else "-"
    yield "-" if row.within is None else "within" if row.within else "beyond"


def _spelled(found: Largest | None) -> str:
    if found is None:
        return "none"
    return f"about {billions(found.parameters)} ({found.layers} layers of {found.heads} heads)"
