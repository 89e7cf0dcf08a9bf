"""Grades an answer from retrieved sources: does it cite, cite rightly, use what was retrieved, and refuse rightly.

A row has `sources`, the names of what was retrieved and stands in its prompt, and `supports`, those of them that hold
the answer. Where none does (an empty list), the right answer is a refusal, and the row is *unanswerable*.

An answer is a text, or a JSON object with `answer` (that text) and, where it likes, `citations` (names of sources) and
`refused` (true or false). A text cites by marks such as [2] or [a, b]; a mark right after a full stop, or alone on the
line below it, is that statement's, and one that begins a line is that line's. It refuses where the set's `refusal`, a
regular expression, is found in it, or where `refused` is true. `citations` stand for every statement of a text without
marks.

The definitions follow ALCE (Gao et al. 2023, arXiv:2305.14627), with `supports` in the place of its judge, a model that
says whether a passage entails a statement. So no model judges; and whether a statement says what its source says is not
judged either. A set's score is the mean over the answers that a metric looks at, 0 where it looks at none:

| metric            | looks at                        | of an answer                                          |
|-------------------|---------------------------------|-------------------------------------------------------|
| citation_coverage | answers to answerable rows      | part of its statements that cite a source of the row  |
| citation_accuracy | the same                        | part of its citations that are in `supports`          |
| retrieval_use     | all answerable rows             | 1 if it does not refuse and cites one of `supports`   |
| refusal_precision | refusals                        | 1 if the row is unanswerable                          |
| refusal_recall    | unanswerable rows               | 1 if it refuses                                       |
| false_confidence  | all but refusals                | 1 if the row is unanswerable: lower is better         |

citation_accuracy is ALCE's citation precision, but looks at each citation by itself. citation_coverage is not ALCE's
citation recall, which wants what is cited to support the statement: how much is cited and how rightly are two targets
here. An answer without statements has 0 of the first, one without citations 0 of the second. A statement is a sentence
or a line; the number of a list (`2.`, `2)`) is none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_empire.data.files import RawRow
from mlx_empire.errors import UserError

# Of an answer, beside its metrics: what a confusion table counts.
REFUSED, UNANSWERABLE = "refused", "unanswerable"
_MARK = re.compile(r"\[([^\[\]]+)\]")
_LIST_NUMBER = re.compile(r"(?m)^[ \t]*\d{1,2}[.)][ \t]+(?=(?:\[[^\[\]\n]+\]|[^\w\n\[])*\w)")  # before words
_AFTER_STOP = re.compile(r"(?m)([.!?])((?:\s*\[[^\[\]]+\])+(?=[ \t]*$)|(?:[ \t]*\[[^\[\]]+\])+)")
_BETWEEN = re.compile(r"(?<=[.!?])\s+(?![^\[\]]*\])|\n+")  # not within a mark


@dataclass(frozen=True)
class Grounds:
    """What was retrieved for a row, and which of it holds the answer: names of sources."""

    sources: tuple[str, ...]
    supports: tuple[str, ...]


@dataclass(frozen=True)
class Read:
    """An answer as it is graded: the names that each statement cites, and whether it refuses."""

    statements: tuple[tuple[str, ...], ...]
    refused: bool

    @property
    def citations(self) -> list[str]:
        """All of them, as often as they stand there."""
        return [name for cited in self.statements for name in cited]


def grounds_of(row: RawRow) -> Grounds:
    """What a row says of its sources. UserError naming the row."""
    sources, supports = (_names(row.value.get(key)) for key in ("sources", "supports"))
    if sources is None or supports is None:
        raise UserError(
            f"{row.where}: needs sources, and supports (those of them that hold the answer, or [] where none does): "
            "lists of texts or whole numbers"
        )
    for name in sources:
        if read_answer(f"It is so [{name}].", None).citations != [name]:
            raise UserError(
                f"{row.where}: sources: {name!r:.40} cannot be cited by a mark such as [2]; name it otherwise: marks "
                "separate names by commas or semicolons"
            )
    strange = next((name for name in supports if name not in sources), None)
    if strange is not None:
        raise UserError(f"{row.where}: supports: {strange!r:.40} is not among its sources")
    return Grounds(sources, supports)


def _names(value: Any) -> tuple[str, ...] | None:
    if not isinstance(value, list) or not all(type(one) in (str, int) for one in value):
        return None
    return tuple(str(one).strip() for one in value)


def graded(grounds: Grounds, text: str, refusal: str | None) -> dict[str, float]:
    """The metrics that look at this answer, and the two facts of a confusion table as 0 or 1."""
    answer = read_answer(text, refusal)
    unanswerable, refused = not grounds.supports, answer.refused
    found = {REFUSED: float(refused), UNANSWERABLE: float(unanswerable)}
    if refused:
        found["refusal_precision"] = float(unanswerable)
    else:
        found["false_confidence"] = float(unanswerable)
    if unanswerable:
        return {**found, "refusal_recall": float(refused)}
    cited = answer.citations
    right = [name for name in cited if name in grounds.supports]
    found["retrieval_use"] = float(bool(right) and not refused)
    if not refused:
        covered = [any(name in grounds.sources for name in one) for one in answer.statements]
        found["citation_coverage"] = sum(covered) / len(covered) if covered else 0.0
        found["citation_accuracy"] = len(right) / len(cited) if cited else 0.0
    return found


def read_answer(text: str, refusal: str | None) -> Read:
    """An answer's statements with what they cite, and whether it refuses; `refusal`: a regular expression."""
    listed: tuple[str, ...] = ()
    whole, refused = text, False
    if (told := _object(text)) is not None:
        whole, refused = told["answer"], told.get("refused") is True
        listed = tuple(dict.fromkeys(_names(told.get("citations")) or ()))
    refused = refused or (refusal is not None and re.search(refusal, whole) is not None)
    statements = [_cited(one) for one in _BETWEEN.split(_with_marks_inside(whole)) if _says(one)]
    if not any(statements):
        statements = [listed for _ in statements]
    return Read(tuple(statements), refused)


def _object(text: str) -> Mapping[str, Any] | None:
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return told if isinstance(told, dict) and isinstance(told.get("answer"), str) else None


def _with_marks_inside(text: str) -> str:
    """The text without list numbers, and each mark before the full stop that it follows."""

    def moved(found: re.Match[str]) -> str:
        return "".join(f"[{names}]" for names in _MARK.findall(found[2])) + found[1]

    return _AFTER_STOP.sub(moved, _LIST_NUMBER.sub("", text))


def _says(statement: str) -> bool:
    """Whether anything but marks is there."""
    return re.search(r"\w", _MARK.sub("", statement)) is not None


def _cited(statement: str) -> tuple[str, ...]:
    names = (name.strip() for mark in _MARK.findall(statement) for name in re.split("[,;]", mark))
    return tuple(dict.fromkeys(name for name in names if name))
