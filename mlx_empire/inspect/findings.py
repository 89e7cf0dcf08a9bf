"""Decides what is worth telling of rows that were read: what a run refuses, what leaks into the validation data,
what is not learnt, what repeats and what contradicts.

Every finding counts all rows that it is about, and names the first `MOST_PLACES` of them by file and line.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np

from mlx_empire.data.files import converting
from mlx_empire.data.row_format import FOREIGN
from mlx_empire.errors import UserError
from mlx_empire.inspect.layouts import layout_of
from mlx_empire.inspect.texts import words
from mlx_empire.inspect.walk import Reading, SeenRows
from mlx_empire.recipe.idle import refuse_unmeasured
from mlx_empire.recipe.schema import Recipe

Item = TypeVar("Item")
Level = Literal["refused", "leak", "look"]
MOST_PLACES = 1000
REPEATS = (
    6.0  # how far ordinary answers do not compress: English prose does 2 to 3 times, what repeats itself more
)
FEW_PAIRS = 0.2  # of the pairs of words in many answers, so many are other ones than before in ordinary text
LEAST_ANSWERS = 20  # before such figures mean anything
ORDERS = (1, 2, 3)


@dataclass(frozen=True)
class RowPlace:
    """A row, and what there is to say of it: why it is refused, or the row that it repeats."""

    where: str
    says: str


@dataclass(frozen=True)
class DataFinding:
    """Something about `count` rows. `level`: a run refuses them; they leak; or a person should look."""

    name: str
    level: Level
    count: int
    sentence: str
    places: tuple[RowPlace, ...] = ()


@dataclass(frozen=True, eq=False)
class SplitRows:
    """The rows of one split: those of `seen` at `index`, which ascends."""

    name: str
    seen: SeenRows
    index: np.ndarray

    @cached_property
    def rows(self) -> np.ndarray:
        """Their lines of numbers (see `walk.COLUMNS`)."""
        every = self.seen.rows
        found: np.ndarray = every if len(self.index) == len(every) else every[self.index]
        return found

    def where(self, place: int) -> str:
        """Where the row at `place` of this split stands."""
        return self.seen.where(int(self.index[place]))

    def own(self, kept: Sequence[tuple[int, Item]]) -> list[Item]:
        """Of what a sample kept of `seen`, that of this split's rows."""
        mine = np.isin([place for place, _ in kept], self.index)
        return [item for is_mine, (_, item) in zip(mine, kept, strict=True) if is_mine]


def find(reading: Reading, parts: Sequence[SplitRows]) -> list[DataFinding]:
    """All findings about the splits, training first, that are made from what the rows say and become."""
    train = parts[0]
    found = [*_refused(parts), *leaks(*parts)]
    if reading.makes_tokens:
        found += [*_not_learnt(reading, parts), *_unknown(parts)]
    found += [*_repeated(train), *_contradictions(train), *_other_layout(reading, train)]
    return found


def unmeasured(recipe: Recipe, reading: Reading, parts: Sequence[SplitRows]) -> list[DataFinding]:
    """The finding about evaluations that a recipe asks for where no rows are held out."""
    try:
        refuse_unmeasured(recipe, held_out=len(parts) > 1 or reading.validation_split > 0)
    except UserError as error:
        return [DataFinding("unmeasured", "refused", len(parts[0].index), str(error))]
    return []


def _refused(parts: Sequence[SplitRows]) -> Iterator[DataFinding]:
    seen = list({id(part.seen): part.seen for part in parts}.values())
    count = sum(one.refused_count for one in seen)
    if count:
        places = [RowPlace(where, reason) for one in seen for where, reason in one.refused]
        yield DataFinding(
            "refused", "refused", count, f"{row_count(count)} that a run refuses", tuple(places[:MOST_PLACES])
        )


def leaks(train: SplitRows, *others: SplitRows) -> Iterator[DataFinding]:
    """Rows of the validation split that are in the training split too: what is measured on them is memory."""
    for valid in others:
        exact = _among(valid.rows["exact"], train.rows["exact"])
        nearly = np.where(exact < 0, _among(valid.rows["words"], train.rows["words"]), -1)
        asked = np.where((exact < 0) & (nearly < 0), _among(valid.rows["prompt"], train.rows["prompt"]), -1)
        asked[valid.rows["prompt"] == 0] = -1
        same: tuple[tuple[str, Level, np.ndarray, str], ...] = (
            ("leakage_exact", "leak", exact, "in the validation data that the training data has too"),
            ("leakage_words", "leak", nearly, "in the validation data whose words the training data has too"),
            (
                "leakage_prompt",
                "look",
                asked,
                "in the validation data that ask what the training data asks too",
            ),
        )
        for name, level, first, says in same:
            (places,) = np.nonzero(first >= 0)
            if len(places):
                pairs = [(valid.where(p), train.where(int(first[p]))) for p in places[:MOST_PLACES].tolist()]
                named = tuple(RowPlace(here, f"as {there}") for here, there in pairs)
                yield DataFinding(name, level, len(places), f"{row_count(len(places))} {says}", named)


def _not_learnt(reading: Reading, parts: Sequence[SplitRows]) -> Iterator[DataFinding]:
    length = reading.sequence_length
    for part in parts:
        rows = part.rows
        (dropped,) = np.nonzero(rows["learnt"] == 0)
        if len(dropped):
            why = f"nothing to learn within {length} positions"
            places = tuple(
                RowPlace(part.where(p), _tokens(rows["tokens"][p])) for p in dropped[:MOST_PLACES].tolist()
            )
            yield DataFinding(
                f"dropped_{part.name}",
                "look",
                len(dropped),
                f"{row_count(len(dropped))} of {part.name} dropped: {why}",
                places,
            )
        lost = rows["tokens"].astype(np.int64) - rows["kept"]
        (cut,) = np.nonzero(lost > 0)
        if len(cut):
            total = int(lost.sum())
            places = tuple(
                RowPlace(part.where(p), f"{_tokens(rows['tokens'][p])}, {lost[p]:,} lost")
                for p in cut[:MOST_PLACES].tolist()
            )
            sentence = (
                f"{row_count(len(cut))} of {part.name} cut at {length} positions: {_tokens(total)} lost"
            )
            yield DataFinding(f"cut_{part.name}", "look", len(cut), sentence, places)


def _unknown(parts: Sequence[SplitRows]) -> Iterator[DataFinding]:
    for part in parts:
        (places,) = np.nonzero(part.rows["unknown"])
        if len(places):
            sentence = (
                f"{row_count(len(places))} of {part.name} with characters that the tokenizer does not know"
            )
            named = (
                RowPlace(part.where(p), _tokens(part.rows["unknown"][p]))
                for p in places[:MOST_PLACES].tolist()
            )
            yield DataFinding(f"unknown_{part.name}", "look", len(places), sentence, tuple(named))


def _repeated(train: SplitRows) -> Iterator[DataFinding]:
    exact, nearly = _first_places(train.rows["exact"]), _first_places(train.rows["words"])
    here = np.arange(len(exact))
    for name, repeats, first, says in (
        ("duplicates_exact", exact < here, exact, "that an earlier row says too, to the letter"),
        ("duplicates_words", (nearly < here) & (exact == here), nearly, "whose words an earlier row has too"),
    ):
        (places,) = np.nonzero(repeats)
        if len(places):
            named = (
                RowPlace(train.where(p), f"as {train.where(int(first[p]))}")
                for p in places[:MOST_PLACES].tolist()
            )
            yield DataFinding(name, "look", len(places), f"{row_count(len(places))} {says}", tuple(named))


def _contradictions(train: SplitRows) -> Iterator[DataFinding]:
    rows = train.rows
    first = _first_places(rows["prompt"])
    (places,) = np.nonzero((rows["prompt"] != 0) & (rows["reply"] != rows["reply"][first]))
    if len(places):
        named = (
            RowPlace(train.where(p), f"otherwise {train.where(int(first[p]))}")
            for p in places[:MOST_PLACES].tolist()
        )
        sentence = f"{row_count(len(places))} with another answer than an earlier row has to the same prompt"
        yield DataFinding("contradictions", "look", len(places), sentence, tuple(named))


def _other_layout(reading: Reading, train: SplitRows) -> Iterator[DataFinding]:
    """Keys that nothing reads, though another tool would learn from them."""
    for key in FOREIGN:
        if count := train.seen.unread[key]:
            sentence = f"{row_count(count)} with {key!r}, which another tool reads and training does not"
            if key in _convertible(train.seen):
                sentence += f"; `{converting(reading.path)}`"
            yield DataFinding("other_layout", "look", count, sentence)


def _convertible(seen: SeenRows) -> tuple[str, ...]:
    """The keys that a conversion would read of such rows; it goes by the first of them."""
    if seen.first is None:
        return ()
    try:
        return layout_of(seen.first[0], None).keys
    except UserError:
        return ()


@dataclass(frozen=True)
class Variety:
    """How much answers differ. `compression`: bytes of `answers` of them over those that DEFLATE leaves; `distinct`: by
    number of words in a row, the part of such runs that are the first of their kind; `commonest`: the part of all
    answers that is one and the same, and where that stands first."""

    answers: int
    compression: float
    distinct: dict[int, float]
    commonest: float
    where: str

    @property
    def collapsed(self) -> bool:
        """Whether that is little: the model would learn to say one thing."""
        few = self.distinct[2] < FEW_PAIRS or self.compression > REPEATS
        return self.answers >= LEAST_ANSWERS and few


def variety(train: SplitRows) -> Variety | None:
    """How much the answers of a sample differ; None where there are none."""
    answers = train.own(train.seen.answers)
    if not answers or not len(train.index):
        return None
    raw = "\n".join(answers).encode("utf-8", "replace")
    runs = [words(text) for text in answers]
    distinct = {}
    for n in ORDERS:
        grams = [tuple(one[i : i + n]) for one in runs for i in range(len(one) - n + 1)]
        distinct[n] = len(set(grams)) / len(grams) if grams else 1.0
    _, first, counts = np.unique(train.rows["reply"], return_index=True, return_counts=True)
    top = int(np.argmax(counts))
    return Variety(
        len(answers),
        len(raw) / len(zlib.compress(raw, 6)),
        distinct,
        float(counts[top] / len(train.index)),
        train.where(int(first[top])),
    )


def collapse(found: Variety) -> DataFinding:
    """The finding about answers that are all alike."""
    parts = ", ".join(f"distinct-{n} {value:.2f}" for n, value in found.distinct.items())
    sentence = (
        f"{found.answers:,} answers that say much the same: they compress {found.compression:.1f} times; {parts}; "
        f"{found.commonest:.0%} are the same one, first at {found.where}"
    )
    return DataFinding("collapse", "look", found.answers, sentence)


def _first_places(values: np.ndarray) -> np.ndarray:
    """For each value the place of the first equal one."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    places: np.ndarray = first[inverse]
    return places


def _among(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """For each value the first place in `known` that has it; -1 where none has."""
    distinct, first = np.unique(known, return_index=True)
    if not len(distinct):
        return np.full(len(values), -1)
    at = np.minimum(np.searchsorted(distinct, values), len(distinct) - 1)
    return np.where(distinct[at] == values, first[at], -1)


def row_count(count: int) -> str:
    """So many rows, in words."""
    return f"{count:,} row{'' if count == 1 else 's'}"


def _tokens(count: int) -> str:
    return f"{count:,} token{'' if count == 1 else 's'}"
