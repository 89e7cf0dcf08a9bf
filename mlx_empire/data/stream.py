"""Documents that become rows without being in memory together: their pieces pass through files, a batch at a time.

Decides what is held: of each document how many pieces it has (9 bytes), of each piece how long it is (8), and while
rows are laid out at most 80 bytes a piece. The pieces' tokens are written as they come. Which of them are held out and
which share a row is known when all are there; where all stay in their order the files are the entry's own, else pieces
are copied once, run by run. What comes out is byte for byte what `build_table` makes of the same documents in memory.
"""

from __future__ import annotations

import errno
import io
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mlx_empire.data.encode import Document
from mlx_empire.data.rows import Counts, Table, offsets_of, packed_rows, pieces_of
from mlx_empire.disk import free_bytes, open_private

HEADER_BYTES = 128  # of a `.npy` file with one axis, whatever its length: numpy leaves room for 21 digits
BYTES_PER_TOKEN = 5  # int32, and a flag
COPIED = 1 << 20  # elements at once
RUNS = 1 << 16  # pieces whose places are looked up at once


class Flat:
    """One flat array as a `.npy` file at `place` (None: in memory), written from its beginning, then read anywhere.

    `total`: the sum of what was appended. OSError where the disk is full.
    """

    def __init__(self, place: Path | None, dtype: str) -> None:
        self.place, self._dtype = place, np.dtype(dtype)
        self._file: BinaryIO = io.BytesIO() if place is None else os.fdopen(open_private(place), "w+b")
        self._file.write(bytes(HEADER_BYTES))
        self.length = self.total = 0

    def append(self, values: np.ndarray) -> None:
        """Write `values` (n,) at the end."""
        self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self.length += len(values)
        self.total += int(values.sum(dtype=np.int64))

    def read(self, first: int, last: int) -> np.ndarray:
        """The elements from `first` up to `last`."""
        size = self._dtype.itemsize
        self._file.seek(HEADER_BYTES + first * size)
        return np.frombuffer(self._file.read((last - first) * size), self._dtype)

    def finish(self) -> np.ndarray:
        """Write the header; the array, which of a file is a memory map that nobody has read yet."""
        header = io.BytesIO()
        about = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(header, about)
        assert header.tell() == HEADER_BYTES
        self._file.seek(0)
        self._file.write(header.getvalue())
        if self.place is None:
            self._file.seek(HEADER_BYTES)
            return np.frombuffer(self._file.read(), self._dtype)
        self.close()
        found: np.ndarray = np.load(self.place, mmap_mode="r", allow_pickle=False)
        return found

    def close(self) -> None:
        """Close the file as it is."""
        self._file.close()


class Pieces:
    """The pieces of documents that came one after the other. `folder`: where they lie; None: in memory.

    Held for each document a count and a flag, for each piece its length; of the first document where its pieces begin.
    """

    def __init__(self, folder: Path | None, name: str, length: int, *, splittable: bool) -> None:
        self._folder, self._length, self._splittable = folder, length, splittable
        self._flats = [
            Flat(None if folder is None else folder / f"{name}.{field}.all", dtype)
            for field, dtype in (("tokens", "<i4"), ("counted", "|u1"))
        ]
        self._sizes, self._of_document, self._cut = array("q"), array("q"), array("b")
        self._begins, self._first_tokens = array("q"), 0
        # Of the document that is being written: tokens that are in no piece yet, how many are in one, how many pieces.
        self._left: tuple[np.ndarray, np.ndarray] | None = None
        self._before = self._kept = 0

    def add(self, document: Document) -> None:
        """Write the pieces of one more document, or of its next part: what is left until the next one comes is
        less than a piece."""
        tokens, counted = document.tokens, document.counted
        if self._left is not None:
            tokens, counted = (
                np.concatenate(pair) for pair in zip(self._left, (tokens, counted), strict=True)
            )
        done = len(tokens)
        if document.more:
            # A piece ends with the next one's first token.
            done = (len(tokens) - 1) // self._length * self._length
        part = Document(document.where, tokens[: done + 1], counted[: done + 1])
        for begin, *written in pieces_of(part, self._length, splittable=self._splittable):
            for flat, values in zip(self._flats, written, strict=True):
                flat.append(values)
            self._sizes.append(len(written[0]))
            self._kept += 1
            if not self._of_document:
                self._begins.append(self._before + begin)
        self._before += done
        if document.more:
            self._left = tokens[done:], counted[done:]
            return
        if not self._of_document:
            self._first_tokens = self._before
        self._of_document.append(self._kept)
        self._cut.append(not self._splittable and len(tokens) > self._length + 1)
        self._left, self._before, self._kept = None, 0, 0

    def __len__(self) -> int:
        return len(self._of_document)

    @property
    def lone_tokens(self) -> int | None:
        """How many tokens the one document has that may be split; None where there are others."""
        return self._first_tokens if len(self) == 1 and self._splittable else None

    def of_documents(self, chosen: np.ndarray) -> Chosen:
        """The pieces of the documents (documents,) bool that are `chosen`."""
        each = np.frombuffer(self._of_document, np.int64) if len(self) else np.zeros(0, np.int64)
        cut = np.frombuffer(self._cut, np.int8) if len(self) else np.zeros(0, np.int8)
        dropped = int(np.count_nonzero(each[chosen] == 0))
        counts = Counts(int(np.count_nonzero(chosen)), int(cut[chosen].sum(dtype=np.int64)), dropped)
        return Chosen(np.flatnonzero(np.repeat(chosen, each)), counts)

    def of_lone(self, edge: int) -> tuple[Chosen, Chosen]:
        """Of the one document what lies before token `edge`, where a piece begins, and what comes after."""
        before = np.array(self._begins, np.int64) < edge
        first, last = (np.flatnonzero(one) for one in (before, ~before))
        return Chosen(first, Counts(1, 0, len(first) == 0)), Chosen(last, Counts(1, 0, len(last) == 0))

    def table(self, name: str, chosen: Chosen, *, packing: bool) -> tuple[Table, int] | None:
        """The rows of a split, as files `name.*.npy` where there is a folder, and how many targets count; None where
        not one is left."""
        order = chosen.pieces
        if not len(order):
            return None
        sizes = np.frombuffer(self._sizes, np.int64)
        if not packing:
            per_row = np.ones(len(order), np.int64)
        else:
            together, per_row = packed_rows(sizes[order], self._length)
            order = order[together]
        flats = self._flats
        if len(order) < len(sizes) or packing:
            self._require_room(int(sizes[order].sum()))
            flats = [self._copied(flat, name, order, offsets_of(sizes)) for flat in self._flats]
        targets = flats[1].total
        tokens, counted = (flat.finish() for flat in flats)
        self._named(name, flats)
        return Table(tokens, counted, offsets_of(sizes[order]), offsets_of(per_row)), targets

    def close(self) -> None:
        """Nothing of what was not taken stays."""
        for flat in self._flats:
            flat.close()
            if flat.place is not None:
                flat.place.unlink(missing_ok=True)

    def _require_room(self, tokens: int) -> None:
        """OSError where so many tokens do not fit beside what is there: said before the disk is full."""
        if self._folder is not None and free_bytes(self._folder) < tokens * BYTES_PER_TOKEN:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _copied(self, flat: Flat, name: str, order: np.ndarray, edges: np.ndarray) -> Flat:
        place = flat.place
        made = Flat(
            None if place is None else place.with_name(f"{name}.{place.name}.part"), flat.read(0, 0).dtype.str
        )
        for part in range(0, len(order), RUNS):
            for start, end in _runs(order[part : part + RUNS], edges):
                for first in range(start, end, COPIED):
                    made.append(flat.read(first, min(first + COPIED, end)))
        return made

    def _named(self, name: str, flats: list[Flat]) -> None:
        """Files get the names that the cache knows; a memory map stays what it was."""
        for flat, field in zip(flats, ("tokens", "counted"), strict=True):
            if flat.place is not None:
                flat.place.rename(flat.place.with_name(f"{name}.{field}.npy"))


@dataclass(frozen=True)
class Chosen:
    """The pieces of one split by their numbers, ascending, and what happened to its documents."""

    pieces: np.ndarray
    counts: Counts


def _runs(order: np.ndarray, edges: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where pieces in `order` lie: (first element, last) of those that follow one another."""
    breaks = np.flatnonzero(np.diff(order) != 1) + 1
    for a, b in zip([0, *breaks.tolist()], [*breaks.tolist(), len(order)], strict=True):
        yield int(edges[order[a]]), int(edges[order[b - 1] + 1])
