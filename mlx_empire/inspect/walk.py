"""One pass over the rows of a split, by the very functions of training: which of them a run would refuse, what tokens
each becomes, which of those are learnt, and what it says.

Decides what is kept of a row that has been read, since the data may be larger than memory: a line of numbers for each
(`COLUMNS`), and whole only what a fair sample holds (`sample`).
"""

from __future__ import annotations

import struct
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mlx_empire import progress
from mlx_empire.data.chat import Remarks
from mlx_empire.data.encode import BATCH, Document, encode_rows, uses_template
from mlx_empire.data.files import RawRow, Source
from mlx_empire.data.messages import read_conversation
from mlx_empire.data.row_format import KEYS, check_row
from mlx_empire.data.rows import build_table
from mlx_empire.data.splits import SPLITTABLE
from mlx_empire.errors import UserError
from mlx_empire.inspect.sample import FairSample
from mlx_empire.inspect.texts import RowTexts, digest64, first_content, plain, texts_of

# By name, as `struct` and numpy have them, 64 bytes a row: where it stands; digests of what it says; its tokens, those
# within the sequence length, those that are learnt, the pieces that it is trained in; unknown tokens; characters.
COLUMNS = {
    "file": "I",
    "line": "I",
    "exact": "Q",
    "words": "Q",
    "prompt": "Q",
    "reply": "Q",
    "tokens": "I",
    "kept": "I",
    "learnt": "I",
    "pieces": "I",
    "unknown": "I",
    "characters": "I",
}
ROW = struct.Struct("=" + "".join(COLUMNS.values()))
READ = KEYS | {"chat": (*KEYS["chat"], "tools", "functions")}
MOST_REFUSED = 1000  # are kept with their reasons; all are counted
TEXTS, TEXT_LENGTH = 2000, 4000  # answers that are looked at together, and how much of each
MOST_SHARED = 2048  # tokens of what every row begins with: of one long row that would be all of it


@dataclass(frozen=True)
class Reading:
    """How rows are read: as a run's data section says it. `tokenizer`: None where no tokens are wanted, or no text is
    read; `vocab_size`: rows of the model's embedding, None where no model is known."""

    path: Path
    format: str
    sequence_length: int
    packing: bool
    mask_prompt: bool
    validation_split: float
    tokenizer: Any
    vocab_size: int | None

    @property
    def makes_tokens(self) -> bool:
        """Whether rows become tokens."""
        return self.tokenizer is not None or self.format == "tokens"

    @property
    def splittable(self) -> bool:
        """Whether a long row is trained in pieces; else it is cut."""
        return self.format in SPLITTABLE


@dataclass(frozen=True, eq=False)
class SeenRow:
    """A row that is kept whole: its tokens (n,) int32 and whether each is learnt (n,) bool; `kept` of them are within
    the sequence length. `text`: what it says, as far as it is shown without tokens."""

    where: str
    tokens: np.ndarray
    learnt: np.ndarray
    kept: int
    text: str


@dataclass
class SeenRows:
    """What one pass found. `shared`: the tokens with which every row begins, at most `MOST_SHARED`; `first`: the first
    row and its tokens; `unread`: keys beside those that are read, with the rows that have them."""

    rows: np.ndarray
    lengths: np.ndarray  # of all pieces, in tokens
    files: list[str]
    refused: list[tuple[str, str]]
    refused_count: int
    shared: np.ndarray
    first: tuple[RawRow, Document | None] | None
    unread: Counter[str]
    shown: list[tuple[int, SeenRow]]
    measured: list[tuple[int, SeenRow]]
    answers: list[tuple[int, str]]

    def where(self, index: int) -> str:
        """The place of a row, as file:line."""
        return f"{self.files[self.rows['file'][index]]}:{self.rows['line'][index]}"


@dataclass
class Walk:
    """Collects what `SeenRows` tells. `shown`, `measured`: how many rows are kept whole, to be shown and scored."""

    reading: Reading
    shown: int
    measured: int = 0
    remarks: Remarks = field(default_factory=Remarks)

    def __post_init__(self) -> None:
        self._rows, self._count, self._lengths = bytearray(), 0, array("I")
        self._files: dict[str, int] = {}
        self._refused: list[tuple[str, str]] = []
        self._refused_count = 0
        self._shared: np.ndarray | None = None
        self._first: tuple[RawRow, Document | None] | None = None
        self._unread: Counter[str] = Counter()
        self._shown: FairSample[SeenRow] = FairSample(self.shown)
        self._measured: FairSample[SeenRow] = FairSample(self.measured)
        self._answers: FairSample[str] = FairSample(TEXTS)

    def over(self, source: Source, tell: Callable[[int], None]) -> SeenRows:
        """Read all rows of a source; `tell` hears after each batch how many there were. UserError where nothing can be
        read."""
        for batch in _batches(source.rows(self._refuse)):
            for row, document in self._encoded(batch):
                texts = texts_of(row, self.reading.format)
                self._first = self._first or (row, document)
                self._unread.update(_unread(row, self.reading.format))
                self.take(row.where, texts, document, partial(plain, row, self.reading.format, TEXT_LENGTH))
            tell(self._count + self._refused_count)
        return self.seen()

    def take(
        self, where: str, texts: RowTexts, document: Document | None, plain_text: Callable[[], str]
    ) -> None:
        """One more row; `plain_text` says what it says."""
        place, tokens = self._count, 0 if document is None else len(document.tokens)
        file, line = _place(where)
        kept, learnt, pieces = self._trained(document)
        self._rows += ROW.pack(
            self._files.setdefault(file, len(self._files)),
            line,
            *(texts.exact, texts.words, texts.prompt, texts.reply),
            *(tokens, kept, learnt, pieces, self._unknown(document)),
            texts.characters,
        )
        self._count += 1
        self._share(document)

        def whole() -> SeenRow:
            return _whole(where, plain_text(), document, kept, learnt)

        self._shown.offer(place, whole)
        if learnt:
            self._measured.offer(place, whole)
        if texts.answer:
            self._answers.offer(place, lambda: texts.answer[:TEXT_LENGTH])

    def seen(self) -> SeenRows:
        """What was found, at the end: the rows' numbers are not copied, so no more rows can be taken."""
        return SeenRows(
            np.frombuffer(self._rows, list(COLUMNS.items())),
            np.frombuffer(self._lengths, np.uint32),
            list(self._files),
            sorted(self._refused, key=lambda pair: _place(pair[0])),
            self._refused_count,
            np.empty(0, np.int32) if self._shared is None else self._shared,
            self._first,
            self._unread,
            self._shown.items(),
            self._measured.items(),
            self._answers.items(),
        )

    def _encoded(self, batch: list[RawRow]) -> Iterator[tuple[RawRow, Document | None]]:
        """The rows of a batch that a run would take, with their tokens; the others are noted."""
        remarks = Remarks()
        try:
            documents = self._documents(batch, remarks)
        except UserError as error:
            if len(batch) == 1:
                self._refuse(batch[0].where, error)
                return
            for row in batch:
                yield from self._encoded([row])
            return
        self.remarks.add(remarks)
        yield from zip(batch, documents, strict=True)

    def _documents(self, batch: list[RawRow], remarks: Remarks) -> list[Document | None]:
        reading = self.reading
        if reading.makes_tokens:
            return list(
                encode_rows(
                    batch, reading.format, reading.tokenizer, reading.mask_prompt, reading.vocab_size, remarks
                )
            )
        progress.advance()
        for row in batch:
            check_row(row, reading.format)
            if reading.format == "chat":
                read_conversation(row, row.value["messages"])
        return [None] * len(batch)

    def _trained(self, document: Document | None) -> tuple[int, int, int]:
        """(tokens within the sequence length, those that are learnt, pieces) of a row, as a run lays it out."""
        if document is None:
            return 0, 0, 0
        length, splittable = self.reading.sequence_length, self.reading.splittable
        table, _ = build_table([document], length, splittable, False)
        kept = len(document.tokens) if splittable else min(len(document.tokens), length + 1)
        if table is None:
            return kept, 0, 0
        sizes = np.diff(table.pieces)
        self._lengths.extend(sizes.tolist())
        return kept, int(np.count_nonzero(table.counted)), len(sizes)

    def _unknown(self, document: Document | None) -> int:
        """How many of a row's tokens stand for characters that the tokenizer does not know."""
        tokenizer = self.reading.tokenizer
        unknown = getattr(tokenizer, "unk_token_id", None)
        if document is None or unknown is None:
            return 0
        if (
            unknown == tokenizer.bos_token_id or unknown in tokenizer.eos_token_ids
        ):  # GPT-2 names its only special one
            return 0
        return int(np.count_nonzero(document.tokens == unknown))

    def _share(self, document: Document | None) -> None:
        """Shorten what all rows begin with to what this one has in common with it."""
        if document is None:
            return
        if self._shared is None:
            self._shared = document.tokens[:MOST_SHARED].copy()
            return
        n = min(len(self._shared), len(document.tokens))
        differs = np.flatnonzero(self._shared[:n] != document.tokens[:n])
        self._shared = self._shared[: differs[0] if len(differs) else n]

    def _refuse(self, where: str, error: UserError) -> None:
        self._refused_count += 1
        if len(self._refused) < MOST_REFUSED:
            self._refused.append((where, str(error).removeprefix(f"{where}: ")))


Item = TypeVar("Item")


def _place(where: str) -> tuple[str, int]:
    file, _, line = where.rpartition(":")
    return file, int(line)


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    remaining = iter(items)
    while batch := list(islice(remaining, BATCH)):
        yield batch


def _unread(row: RawRow, data_format: str) -> Iterator[str]:
    """The keys of a row that training does not read. A table's row has every column: None is nothing."""
    return (k for k, value in row.value.items() if value is not None and k not in READ[data_format])


def _whole(where: str, text: str, document: Document | None, kept: int, learnt: int) -> SeenRow:
    """A row as it is kept: what is learnt is what the run's table counts, not what the row alone would ask for."""
    if document is None:
        return SeenRow(where, np.empty(0, np.int32), np.empty(0, bool), 0, text)
    flags = document.counted.astype(bool)
    flags[:1] = False
    flags[kept:] = False
    assert learnt in (0, int(flags.sum())), "a row is shown as it is trained"
    return SeenRow(where, document.tokens, flags & bool(learnt), kept, text)


def texts_of_tokens(document: Document) -> RowTexts:
    """What a part of a document says, by its tokens."""
    exact = digest64(document.tokens.tolist())
    return RowTexts(exact, exact, 0, exact, "", 0)


def beginning(seen: SeenRows, reading: Reading) -> tuple[str, str]:
    """What every row begins with, as text, and how much of it no row has itself: the chat template writes it."""
    if seen.first is None or not len(seen.shared) or reading.tokenizer is None:
        return "", ""
    text = str(reading.tokenizer.decode(seen.shared.tolist()))
    if not uses_template(reading.format, reading.tokenizer):
        return text, ""
    head = first_content(seen.first[0], reading.format).strip()
    place = text.find(head) if head else -1
    if place < 0:  # what is shared ends within the first content, or before it
        place = len(text) - _overlap(text, head)
    return text, text[:place]


def _overlap(text: str, head: str) -> int:
    """How many characters at the end of `text` are the beginning of `head`, by the Knuth-Morris-Pratt table of both:
    the time grows with their length, not with its square."""
    codes = [*map(ord, head[: len(text)]), -1, *map(ord, text)]
    table = [0] * len(codes)
    for place in range(1, len(codes)):
        same = table[place - 1]
        while same and codes[same] != codes[place]:
            same = table[same - 1]
        table[place] = same + (codes[same] == codes[place])
    return table[-1]
