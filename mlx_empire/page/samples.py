"""Held-out rows as a page shows them: tokens coloured by the probability that a model gives them, at first and now."""

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
class Sample:
    """A held-out row as the model read it at some steps: (what stands above it, its tokens) for each."""

    views: Sequence[tuple[str, Sequence[Token]]]


def samples_of(run: Overview) -> list[Sample]:
    """The rows that the run reads, at first and as of the last evaluation."""
    found = read_readings(run.folder) if run.recipe is None or run.recipe.report.samples else None
    if found is None:
        return []
    first, last = found["first"], found["last"]
    times = [first] if first["step"] == last["step"] else [first, last]
    return [
        Sample(
            [(_when(one["step"], texts[i]), _tokens(texts[i])) for one in times for texts in [one["texts"]]]
        )
        for i in range(min(len(one["texts"]) for one in times))
    ]


def samples_beside(looks: Sequence[Look]) -> list[Sample]:
    """The rows that all these runs read, as of the last evaluation of each."""
    found = {look.name: read_readings(look.overview.folder) for look in looks}
    texts = {name: one["last"]["texts"] for name, one in found.items() if one is not None}
    if len(texts) < len(looks):
        return []
    samples = []
    for rows in zip(*texts.values(), strict=False):
        if all(row["tokens"] == rows[0]["tokens"] for row in rows):
            steps = [one["last"]["step"] for one in found.values() if one is not None]
            parts = zip(texts, steps, rows, strict=True)
            samples.append(
                Sample([(f"{name}, {_when(step, row)}", _tokens(row)) for name, step, row in parts])
            )
    return samples


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
