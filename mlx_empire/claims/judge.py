"""What a claim is, and how it is judged: a number of a document, and a question whose answer is computed here.

Decides which words a verdict has: numbers as `plan.agreement` says; words agree or do not. A claim is data
(`claims.toml`): which question is ours, and its settings. Numbers that a plan has too stand there: a claim names
`{ hours = "command tuning" }` of `plan.intentions`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_empire.plan.agreement import agreement
from mlx_empire.plan.chips import GIGA
from mlx_empire.plan.intentions import INTENTIONS

FILE = Path(__file__).with_name("claims.toml")
TO_MEASURE = "to be measured"  # what no plan can say
Value = float | tuple[float, float] | str


@dataclass(frozen=True)
class Ours:
    """What is computed here: a number, (low, high) or a word, and the formula with its figures."""

    value: Value
    formula: str


@dataclass(frozen=True)
class Claim:
    """A number of a document: where it stands, what it is of, in which unit, and why ours is another."""

    document: str
    place: str
    what: str
    theirs: Value
    unit: str
    ask: str
    settings: Mapping[str, Any]
    why: str


@dataclass(frozen=True)
class Judged:
    """A claim beside what is computed here."""

    claim: Claim
    ours: Ours

    @property
    def verdict(self) -> str:
        """`agrees`, `near` or `differs`; of numbers also how many times ours is theirs."""
        theirs, ours = self.claim.theirs, self.ours.value
        if ours == TO_MEASURE:
            return TO_MEASURE
        if isinstance(theirs, str) or isinstance(ours, str):
            return "agrees" if theirs == ours else "differs"
        return agreement(_range(theirs), _range(ours))


def claims() -> list[Claim]:
    """All claims, in the documents' order."""
    with FILE.open("rb") as file:
        rows = tomllib.load(file)["claim"]
    return [
        Claim(
            row["document"],
            row["place"],
            row["what"],
            _value(row["theirs"]),
            row.get("unit", ""),
            row["ask"],
            row.get("with", {}),
            row.get("why", ""),
        )
        for row in rows
    ]


def gb(size: float) -> str:
    """Bytes in 10^9, as formulas have them."""
    return f"{size / GIGA:,.0f} GB" if size >= 100 * GIGA else f"{size / GIGA:.3g} GB"


def judged(claim: Claim, questions: Mapping[str, Callable[..., Ours]]) -> Judged:
    """The claim and our answer to its question."""
    return Judged(claim, questions[claim.ask](**claim.settings))


def _value(written: Any) -> Value:
    if isinstance(written, list):
        low, high = written
        return float(low), float(high)
    if isinstance(written, dict):
        low, high = INTENTIONS[written["hours"]].hours
        return float(low), float(high)
    value: float | str = written
    return value


def _range(value: Value) -> tuple[float, float]:
    assert not isinstance(value, str)
    return value if isinstance(value, tuple) else (float(value), float(value))
