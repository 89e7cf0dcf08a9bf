"""What the values of a recipe's keys may be: paths, counts, durations and the like, and what all sections share."""

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mlx_empire.recipe.duration import Duration
from mlx_empire.recipe.text import printable

MAX_COUNT = 2**31 - 1


def _path(written: object) -> object:
    if isinstance(written, Path):
        written = str(written)
    if not isinstance(written, str) or not printable(written) or not 0 < len(written) <= 4096:
        raise ValueError("not a path")
    try:
        return Path(written).expanduser()
    except RuntimeError:
        raise ValueError("no such home directory") from None


def as_tuple(value: object) -> object:
    """YAML's lists as tuples, which do not change."""
    return tuple(value) if isinstance(value, list) else value


RecipePath = Annotated[Path, BeforeValidator(_path)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]


class Section(BaseModel):
    """What all sections share: no unknown keys, no silent conversion of types, no change after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def exact_number(value: object) -> object:
    """Keeps true and 1.0 from passing as the literal 1."""
    if isinstance(value, bool | float):
        raise ValueError("not a whole number")
    return value


def power_of_two(value: object) -> object:
    """A whole number stands for the float; of others only powers of two pass, which change no bit they multiply."""
    if isinstance(value, bool) or (
        isinstance(value, int | float) and (value < 1 or math.frexp(value)[0] != 0.5)
    ):
        raise ValueError("not a power of two")
    return float(value) if isinstance(value, int) else value


def true_or_false(value: object) -> object:
    """Keeps 1 and 0.0 from passing as the literals true and false, which they equal."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError("neither true nor false")
    return value


def step_as_text(written: object) -> object:
    """A step may be written as a number."""
    step = isinstance(written, int) and not isinstance(written, bool) and written > 0
    return str(written) if step else written


def _positive_duration(written: object) -> Duration:
    duration = Duration.parse(written)
    if duration.value == 0:
        raise ValueError("zero")
    return duration


def _length(written: object) -> Duration:
    """A length of training: by the clock it would be another one on every machine, and so would the result."""
    duration = Duration.parse(written)
    if duration.timed:
        raise ValueError("wall time is no length of training")
    return duration


def _whole_run(written: object) -> Duration:
    duration = _length(_positive_duration(written))
    if duration.unit == "percent":
        raise ValueError("run.steps cannot be a percentage of itself")
    return duration


LENGTHS = "steps (100), percent (3%), counted targets (5Mtok) or epochs (1ep)"
OFTEN = "steps (100), percent (3%), counted targets (5Mtok), epochs (1ep) or wall time (90s, 30min, 2h)"
AnyLength = Annotated[Duration, BeforeValidator(_length)]
PositiveDuration = Annotated[Duration, BeforeValidator(_positive_duration)]
RunLength = Annotated[Duration, BeforeValidator(_whole_run)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Bits = Annotated[Literal[2, 3, 4, 6, 8, "ternary", "mxfp4", "mxfp8", "nvfp4"], BeforeValidator(exact_number)]
_NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
ModelSource = Annotated[str, Field(pattern=f"^{_NAME}/{_NAME}@[A-Za-z0-9][A-Za-z0-9._/-]{{0,95}}$")]
KeyName = Annotated[str, Field(pattern=r"^[a-z_]+\.[a-z_]+$")]
Share = Annotated[float, Field(gt=0, le=1e15)]
