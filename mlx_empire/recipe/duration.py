"""Decides how lengths of training are written and counted: steps (100), percent (3%), tokens (5Mtok), epochs (1ep).

Tokens are the targets that count in the loss, never input positions. Where something is done now and then, and no bit
of the result hangs on when, it may also be written as wall time (90s, 30min, 2h), which has no length in steps.

All arithmetic is exact (fractions of the decimal digits that the user wrote), so 10% of 30 steps is 3, not 4.
"""

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Literal

Unit = Literal["steps", "percent", "tokens", "epochs", "seconds"]

_WRITTEN = re.compile(r"([0-9]{1,16}(?:\.[0-9]{1,60})?) ?(%|[kMBT]?tok|ep|s|min|h)", re.ASCII)
_UNITS: dict[str, tuple[Unit, int]] = {  # what is written -> (unit, how many of it)
    "%": ("percent", 1),
    "tok": ("tokens", 1),
    "ktok": ("tokens", 10**3),
    "Mtok": ("tokens", 10**6),
    "Btok": ("tokens", 10**9),
    "Ttok": ("tokens", 10**12),
    "ep": ("epochs", 1),
    "s": ("seconds", 1),
    "min": ("seconds", 60),
    "h": ("seconds", 3600),
}
_LARGEST: dict[Unit, int] = {
    "steps": 10**12,
    "percent": 100,
    "tokens": 10**15,
    "epochs": 10**6,
    "seconds": 10**9,
}


@dataclass(frozen=True)
class Duration:
    """A length of training: `value` in `unit`. Steps and tokens are whole numbers; percent is of `run.steps`; seconds
    are of wall time.

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
        """The duration that stands in a recipe: an int (steps) or a string such as `3%`, `5Mtok`, `30min`."""
        if isinstance(written, Duration):
            return written
        if isinstance(written, int) and not isinstance(written, bool):
            return cls(written, "steps")
        match = _WRITTEN.fullmatch(written) if isinstance(written, str) else None
        if match is None:
            raise ValueError("not a duration")
        number, suffix = match.groups()
        unit, scale = _UNITS[suffix]
        exact = Fraction(number) * scale
        if unit == "tokens" and exact.denominator != 1:
            raise ValueError("tokens are whole")
        return cls(float(exact), unit)

    def __str__(self) -> str:
        value, suffix = (
            self.value,
            {"steps": "", "percent": "%", "tokens": "tok", "epochs": "ep"}.get(self.unit),
        )
        if suffix is None:
            scale, suffix = next(
                (n, s) for n, s in ((3600, "h"), (60, "min"), (1, "s")) if not value % n or n == 1
            )
            value = value // scale if scale > 1 else value
        return f"{Decimal(str(value)):f}{suffix}"

    @property
    def timed(self) -> bool:
        """Whether it is wall time."""
        return self.unit == "seconds"

    def to_steps(self, total_steps: int | None, tokens_per_step: int, steps_per_epoch: float) -> int:
        """This duration in optimizer steps.

        `total_steps` is `run.steps` in steps (None only while that itself is being resolved). Tokens and
        epochs are rounded up (never fewer than asked for), percent to the nearest step; what is not 0 is at
        least one step. Wall time has no length in steps.
        """
        assert not self.timed, "wall time has no length in steps"
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
