"""Held-out rows as a page shows them, at first and now: what a model wrote after their prompts, where it can be held,
and their tokens coloured by the probability that it gives them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_empire.evaluation.reading import read_readings
from mlx_empire.page.watch import Look
from mlx_empire.run.overview import Overview

LEVEL_BOUNDS = (0.01, 0.1, 0.5, 0.9)  # of a token's probability, from one colour to the next


@dataclass(frozen=True)
class Token:
    """A token of a sample: its text, the level of its colour (0 to 4; None where nothing is to be learnt), in words."""

    text: str
    level: int | None
    told: str


@dataclass(frozen=True)
class Moment:
    """A row at one moment: what stands above it, its tokens, and what the model wrote after the prompt, if it did."""

    when: str
    tokens: Sequence[Token]
    written: str | None


@dataclass(frozen=True)
class Sample:
    """A held-out row at some moments; `prompt` and what the row has after it, where the model wrote."""

    views: Sequence[Moment]
    prompt: str | None
    held_out: str | None


def samples_of(run: Overview) -> list[Sample]:
    """The rows that the run reads, at first and as of the last evaluation."""
    found = read_readings(run.folder) if run.recipe is None or run.recipe.report.samples else None
    if found is None:
        return []
    first, last = found["first"], found["last"]
    times = [first] if first["step"] == last["step"] else [first, last]
    rows = zip(*(one["texts"] for one in times), strict=False)
    return [_sample([_when(one["step"], row) for one, row in zip(times, at, strict=True)], at) for at in rows]


def samples_beside(looks: Sequence[Look]) -> list[Sample]:
    """The rows that all these runs read, as of the last evaluation of each."""
    found = [
        (look.name, readings["last"]) for look in looks if (readings := read_readings(look.overview.folder))
    ]
    if len(found) < len(looks):
        return []
    return [
        _sample(
            [f"{name}, {_when(one['step'], row)}" for (name, one), row in zip(found, rows, strict=True)], rows
        )
        for rows in zip(*(one["texts"] for _, one in found), strict=False)
        if all(row["tokens"] == rows[0]["tokens"] for row in rows)
    ]


def _sample(above: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Sample:
    """One row at several moments, or in several runs."""
    written = [row.get("continued") for row in rows]
    shown: Mapping[str, Any] = next((one for one in reversed(written) if one is not None), {})
    views = [
        Moment(when, _tokens(row), None if one is None else str(one["written"]))
        for when, row, one in zip(above, rows, written, strict=True)
    ]
    return Sample(views, shown.get("prompt"), shown.get("held_out"))


def _when(step: int, text: Mapping[str, Any]) -> str:
    """Which step, and the mean probability of what is learnt."""
    pairs = zip(text["probabilities"], text["counted"], strict=True)
    learnt = [float(p) for p, counts in pairs if counts and p is not None]
    mean = f": mean probability {100 * sum(learnt) / len(learnt):.0f} %" if learnt else ""
    return ("before the first step" if step == 0 else f"after step {step:,}") + mean


def _tokens(text: Mapping[str, Any]) -> list[Token]:
    tokens = []
    for piece, value, counts in zip(text["tokens"], text["probabilities"], text["counted"], strict=True):
        learnt = counts and value is not None
        level = min(sum(value >= bound for bound in LEVEL_BOUNDS), len(LEVEL_BOUNDS)) if learnt else None
        told = (
            "nothing comes before it" if value is None else f"{value:.1%}{'' if counts else ', not learnt'}"
        )
        tokens.append(Token(str(piece), level, told))
    return tokens
