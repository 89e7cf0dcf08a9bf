"""Decides how a text that is too long to be tokenised at once becomes tokens: in windows that overlap.

A window's first and last tokens are not those of the text, for its words are cut there. But a tokenizer looks a few
words far: where two windows begin a token at the same character and agree on `SAME` tokens before and after it, they
are one behind the other what the text has there. Where they agree nowhere (a word of thousands of letters) the second
begins anew at the first's last token. So what is in memory is a few windows, and tokens depend on the text alone.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from mlx_empire import progress
from mlx_empire.data.files import RawRow, Source, not_utf8, unreadable

PART_BYTES = 2**20  # of a document that are read at once
WINDOW = 2**16  # characters from one window to the next
OVERLAP = 2**11  # characters that two windows share
TOGETHER = 8  # windows tokenised together: the tokenizer's own threads share them
SAME = 16

Offsets = list[tuple[int, int]]  # of each token, where its characters begin and end
Encode = Callable[[list[str]], Iterable[tuple[list[int], Offsets]]]


def rows_in_parts(source: Source) -> Iterator[RawRow]:
    """As `Source.rows`, but a long `.txt` document comes in parts, so that it need not fit in memory."""
    if source.kind != ".txt":
        yield from source.rows()
        return
    for file in source.files:
        try:
            yield from _document(file)
        except OSError as error:
            raise unreadable(file, error) from error


def _document(file: Path) -> Iterator[RawRow]:
    where, line, decoder = f"{file}:1", 1, codecs.getincrementaldecoder("utf-8-sig")()
    with file.open("rb") as content:
        part = content.read(PART_BYTES)
        while True:
            following = content.read(PART_BYTES)
            try:
                text = decoder.decode(part, final=not following)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                raise not_utf8(f"{file}:{line}", error) from error
            yield RawRow(where, {"text": text}, more=bool(following))
            if not following:
                return
            line += text.count("\n")
            part = following


def tokens_in_parts(parts: Iterable[str], encode: Encode) -> Iterator[np.ndarray]:
    """The tokens (n,) int32 of the text that `parts` are one behind the other, some at a time.

    encode: the ids and offsets of several texts, without special tokens.
    """
    left: _Window | None = None
    windows = _windows(parts)
    while together := list(islice(windows, TOGETHER)):
        progress.advance()
        for right in _encoded(together, encode):
            if left is not None:
                end, begin = left.seam(right)
                yield left.ids[:end]
                if begin is None:
                    (right,) = _encoded([right.beginning_at(left.place(end))], encode)
                right = right.behind(begin or 0)
            left = right
    if left is not None:
        yield left.ids


@dataclass(frozen=True)
class _Window:
    """A text, which character of the whole one it begins with, its tokens (n,) int32, and of each the character where
    it begins (n,) int64: -1 where that belongs to the token before as well.
    """

    text: str
    first: int
    ids: np.ndarray
    begins: np.ndarray

    def seam(self, right: _Window) -> tuple[int, int | None]:
        """Which of the tokens here comes first in `right`, and which that is there; None: it must begin there."""
        middle = (right.first + self.first + len(self.text)) // 2
        behind = np.flatnonzero(self.begins >= middle)
        there = {int(place): token for token, place in enumerate(right.begins[: 2 * OVERLAP]) if place >= 0}
        for here in behind.tolist():
            token = there.get(int(self.begins[here]), 0)
            if here >= SAME <= token and here + SAME <= len(self.ids):
                pair = self.ids[here - SAME : here + SAME], right.ids[token - SAME : token + SAME]
                if np.array_equal(*pair):
                    return here, token
        return int(behind[0]) if len(behind) else len(self.ids), None

    def place(self, token: int) -> int:
        """The character where a token begins; behind the last one, where the text ends."""
        return int(self.begins[token]) if token < len(self.ids) else self.first + len(self.text)

    def beginning_at(self, place: int) -> tuple[int, str]:
        """The text from a character on."""
        return place, self.text[place - self.first :]

    def behind(self, token: int) -> _Window:
        """Without the tokens before this one."""
        return _Window(self.text, self.first, self.ids[token:], self.begins[token:])


def _windows(parts: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Texts that overlap, and where each begins; the last is longer than what it shares."""
    held, first = "", 0
    for part in parts:
        for start in range(0, len(part), WINDOW):
            held += part[start : start + WINDOW]
            while len(held) > WINDOW + OVERLAP:
                yield first, held[: WINDOW + OVERLAP]
                held, first = held[WINDOW:], first + WINDOW
    yield first, held


def _encoded(texts: list[tuple[int, str]], encode: Encode) -> Iterator[_Window]:
    for (first, text), (ids, offsets) in zip(texts, encode([text for _, text in texts]), strict=True):
        begins, ends = np.array(offsets, np.int64).reshape(-1, 2).T
        before = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]]) if len(ends) else ends
        own = begins >= before
        own[1:] &= begins[1:] != begins[:-1]
        yield _Window(text, first, np.array(ids, np.int32), np.where(own, begins + first, -1))
