"""What the sections of a recipe have in common: strictness, and the types that several of them use."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

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
