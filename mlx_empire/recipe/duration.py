"""Decides how lengths of training are written and counted: steps (100), percent (3%), tokens (5Mtok), epochs
(1ep).

All arithmetic is exact (fractions of the decimal digits that the user wrote), so 10% of 30 steps is 3, not 4.
"""

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Literal

Unit = Literal["steps", "percent", "tokens", "epochs"]

_WRITTEN = re.compile(r"([0-9]{1,16}(?:\.[0-9]{1,60})?) ?(%|[kMBT]?tok|ep)", re.ASCII)
_SCALE = {"%": 1, "ep": 1, "tok": 1, "ktok": 10**3, "Mtok": 10**6, "Btok": 10**9, "Ttok": 10**12}
_LARGEST: dict[Unit, int] = {"steps": 10**12, "percent": 100, "tokens": 10**15, "epochs": 10**6}


@dataclass(frozen=True)
class Duration:
    """A length of training: `value` in `unit`. Steps and tokens are whole numbers; percent is of `run.steps`.

    Raises ValueError for a negative, fractional (steps, tokens) or absurdly large value.
    """

    value: float
    unit: Unit = "steps"

    def __post_init__(self) -> None:
        if not 0 <= self.value <= _LARGEST[self.unit]:
            raise ValueError(f"{self.value} {self.unit} is not between 0 and {_LARGEST[self.unit]}")
        if self.value == int(self.value):
            object.__setattr__(self, "value", int(self.value))
        elif self.unit in ("steps", "tokens"):
            raise ValueError(f"{self.value} {self.unit} is not a whole number")

    @classmethod
    def parse(cls, written: object) -> "Duration":
        """The duration that stands in a recipe: an int (steps) or a string such as `3%`, `5Mtok`, `0.5ep`."""
        if isinstance(written, Duration):
            return written
        if isinstance(written, int) and not isinstance(written, bool):
            return cls(written, "steps")
        match = _WRITTEN.fullmatch(written) if isinstance(written, str) else None
        if match is None:
            raise ValueError("not a duration")
        number, suffix = match.groups()
        exact = Fraction(number) * _SCALE[suffix]
        unit: Unit = "percent" if suffix == "%" else "epochs" if suffix == "ep" else "tokens"
        if unit == "tokens" and exact.denominator != 1:
            raise ValueError("tokens are whole")
        return cls(float(exact), unit)

    def __str__(self) -> str:
        suffix = {"steps": "", "percent": "%", "tokens": "tok", "epochs": "ep"}[self.unit]
        return f"{Decimal(str(self.value)):f}{suffix}"

    def to_steps(self, total_steps: int | None, tokens_per_step: float, steps_per_epoch: float) -> int:
        """This duration in optimizer steps.

        `total_steps` is `run.steps` in steps (None only while that itself is being resolved). Tokens and
        epochs are rounded up (never fewer than asked for), percent to the nearest step; what is not 0 is at
        least one step.
        """
        if self.value == 0:
            return 0
        exact = Fraction(str(self.value))
        if self.unit == "steps":
            return int(exact)
        if self.unit == "percent":
            assert total_steps is not None, "a percentage of run.steps needs run.steps"
            return max(1, math.floor(exact * total_steps / 100 + Fraction(1, 2)))
        if self.unit == "tokens":
            return math.ceil(exact / Fraction(tokens_per_step))
        return math.ceil(exact * Fraction(steps_per_epoch))
