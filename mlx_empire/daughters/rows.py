"""Which rows a generation of a daughter learns, and which it is measured on: pure functions of what rows say.

A row is known by a hash of what it says, so its place in a file does not matter. A generation learns the rows that no
generation which it comes from has learnt, and `daughters.replay` of those that one has and that are still there, chosen
by row and generation. What is held out is valid.jsonl as it is by now; where `data.validation_split` holds rows out,
one that was held out stays so, and of new ones its part is, chosen by the row alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_empire.data.files import locate
from mlx_empire.data.splits import held_out_rows
from mlx_empire.recipe.sections import DataSection

DEFAULT_REPLAY = 0.25
HEX_DIGITS = 32  # of a row's hash: 128 bits

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Offered:
    """The rows that a person has by now, by their hashes; `valid`: None without such a file. `order`: the hashes of all
    rows to learn from as they stand in the files, a row that stands twice twice.
    """

    train: Mapping[str, Row]
    valid: Mapping[str, Row] | None
    order: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Of the rows to learn from, whatever their order."""
        return hashlib.sha256("".join(sorted(self.train)).encode()).hexdigest()


@dataclass(frozen=True)
class Learnt:
    """What a generation learns and is measured on, as hashes; `offered`: the digest of what it was chosen from."""

    train: tuple[str, ...]
    valid: tuple[str, ...]
    offered: str


def rows_of(data: DataSection) -> Offered:
    """What lies at data.path. UserError as from `locate` and `Source.rows`."""
    train, valid = locate(data.only_path)
    rows = [(row_hash(row.value), row.value) for row in train.rows()]
    held_out = None if valid is None else {row_hash(row.value): row.value for row in valid.rows()}
    return Offered(dict(rows), held_out, tuple(name for name, _ in rows))


def of_the_first(offered: Offered, fraction: float | None) -> Learnt:
    """What a first generation learns of these rows: all, but for those that data.validation_split holds out."""
    names = offered.order
    split = (
        offered.valid is None and fraction and len(names) > 1
    )  # a lone document is cut, and held out in part
    held = set(held_out_rows(len(names), fraction)) if split and fraction else set()
    valid = offered.valid or [name for i, name in enumerate(names) if i in held]
    return Learnt(tuple(n for i, n in enumerate(names) if i not in held), tuple(valid), offered.digest)


def of_the_next(
    offered: Offered, before: Sequence[Learnt], number: int, replay: float | None, fraction: float | None
) -> Learnt | None:
    """What generation `number` learns; None where no row is new to it. `before`: those that it comes from."""
    known = {name for one in before for name in one.train}
    if offered.valid is not None:
        valid = list(offered.valid)
    else:
        once = {name for one in before for name in one.valid}
        valid = [
            name
            for name in offered.train
            if name in once or (name not in known and fraction and _part(name, "held out") < fraction)
        ]
    apart = set(valid) if offered.valid is None else set()
    new = {name for name in offered.train if name not in known and name not in apart}
    if not new:
        return None
    share = DEFAULT_REPLAY if replay is None else replay
    again = {name for name in offered.train if name in known and _part(name, f"generation {number}") < share}
    chosen = new | (again - apart)
    train = tuple(name for name in offered.order if name in chosen)
    return Learnt(train, tuple(valid), offered.digest)


def as_lines(rows: Mapping[str, Row], names: Collection[str]) -> str:
    """The rows of these names as JSON lines."""
    return "".join(json.dumps(rows[name], ensure_ascii=False, default=str) + "\n" for name in names)


def row_hash(row: Row) -> str:
    """What a row is known by."""
    text = json.dumps(row, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:HEX_DIGITS]


def _part(name: str, purpose: str) -> float:
    """A number from 0 to below 1 for a row and a purpose."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{name}".encode()).digest()[:8], "big") / 2**64
