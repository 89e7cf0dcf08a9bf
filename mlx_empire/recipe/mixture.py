"""What a recipe says of several sources of rows: `data.sources`, and which of them are drawn when, how often.

Sources are mixed by weight among those that are open at a step; `from` and `to`, parts of the run, make a curriculum.
One path may stand twice, with other weights at other times: it is one source. Arithmetic is exact, on the decimal
digits that the user wrote.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from mlx_empire.recipe.fields import RecipePath, Section

SOURCES = (
    "a list of sources such as [{path: data/general, weight: 3}, {path: data/mine, weight: 1, from: 0.5}], each what "
    "data.path may be, with a weight above 0 (1) and from and to as parts of the run from 0 to 1 (0 and 1); or [] "
    "(data.path alone)"
)
MOST_SOURCES = 64


class DataSource(Section):
    """Rows that are drawn by `weight` among the sources that are open, from `start` to `end` of the run (0 to 1)."""

    path: RecipePath
    weight: Annotated[float, Field(gt=0, le=1e9)] = 1.0
    start: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, alias="from")
    end: Annotated[float, Field(gt=0, le=1)] = Field(default=1.0, alias="to")

    @model_validator(mode="after")
    def _is_open_at_some_time(self) -> Self:
        if self.start >= self.end:
            raise ValueError("from is not below to")
        return self

    @property
    def whole(self) -> bool:
        """Whether it is open all the run."""
        return (self.start, self.end) == (0, 1)


@dataclass(frozen=True)
class Period:
    """A part of the run, from `start` up to `end` (0 to 1), in which the same sources are open: `weights` by the place
    of their path in `paths_of`."""

    start: Fraction
    end: Fraction
    weights: dict[int, Fraction]

    def steps(self, steps: int) -> tuple[int, int]:
        """The steps of a run of so many (from 0) that begin in it, up to the second."""
        return math.ceil(self.start * steps), math.ceil(self.end * steps)


def paths_of(sources: Sequence[DataSource]) -> tuple[Path, ...]:
    """The paths of the sources, each once, as they stand first."""
    return tuple(dict.fromkeys(source.path for source in sources))


def periods(sources: Sequence[DataSource]) -> list[Period]:
    """The run from beginning to end, in periods; one without weights is of no source."""
    paths = paths_of(sources)
    edges = sorted({Fraction(0), Fraction(1), *(_exact(e) for s in sources for e in (s.start, s.end))})
    found = []
    for start, end in pairwise(edges):
        weights: dict[int, Fraction] = {}
        for source in sources:
            if _exact(source.start) <= start and end <= _exact(source.end):
                place = paths.index(source.path)
                weights[place] = weights.get(place, Fraction(0)) + _exact(source.weight)
        found.append(Period(start, end, dict(sorted(weights.items()))))
    return found


def shares(sources: Sequence[DataSource], steps: int | None = None) -> list[Fraction]:
    """Which part of all rows that a run reads is expected of each path; with `steps`, of a run of so many."""
    found = [Fraction(0)] * len(paths_of(sources))
    for one in periods(sources):
        first, last = one.steps(steps) if steps else (one.start, one.end)
        total = sum(one.weights.values())
        for place, weight in one.weights.items():
            found[place] += Fraction(last - first) * weight / total / (steps or 1)
    return found


def gap(sources: Sequence[DataSource]) -> str | None:
    """The first part of the run in which no source is open, in words."""
    empty = next((one for one in periods(sources) if not one.weights), None)
    return None if empty is None else f"from {float(empty.start):g} to {float(empty.end):g} of the run"


def _exact(number: float) -> Fraction:
    return Fraction(str(number))
