"""What there is to know of every key of a recipe, from the schema: the one source of docs/keys.md.

`python -c "from mlx_empire.recipe.reference import page; print(page(), end='')"` writes that page (`make docs`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pydantic.fields import FieldInfo

from mlx_empire.recipe.explain import leaf_fields
from mlx_empire.recipe.load import written

PREFACE = """\
# Every key of a recipe

Part of [the README](../README.md). Written by `make docs` from the schema in `mlx_empire/recipe/`; do not edit.

Impossible combinations are refused in one line with place, key, value and remedy. A key that has no effect with the
others is told at the start and in the capacity report. *Counted targets* are what the loss is a mean over; *positions*
are what passes the layers. Wall time is that of the first machine's clock since the last time, or since this process
began to train: no bit of a result hangs on it.

| key | accepts | default | what it decides |
|---|---|---|---|
"""


class KeyRow(NamedTuple):
    """A key as `section.key`; what it accepts, its default as a recipe has it, and a sentence on what it decides."""

    key: str
    accepts: str
    default: str
    decides: str


def key_rows() -> Iterator[KeyRow]:
    """Every key, in the schema's order."""
    for key, info in leaf_fields().items():
        yield KeyRow(key, str(info.description), _default(info), str(info.title))


def page() -> str:
    """The text of docs/keys.md."""
    rows = (
        f"| `{r.key}` | {_cell(r.accepts)} | {_cell(r.default)} | {_cell(r.decides)} |" for r in key_rows()
    )
    return PREFACE + "\n".join(rows) + "\n"


def _default(info: FieldInfo) -> str:
    return "must be given" if info.is_required() else written(info.default)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
