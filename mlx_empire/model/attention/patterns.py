"""Who attends to whom, as numbers in place of a mask: causal, in a window, in chunks, within documents.

Documents and chunks cut a row into *segments*; a position attends within its own segment only, to what is not after it
and, with a window, to the last few positions. A mask that a model makes is recognised only if it is that pattern
element by element.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

CAUSAL = "causal"  # as MLX and mlx-lm say it
_COMPARED = 256  # rows of a mask that are compared at a time

Cuts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Pattern:
    """Causal attention to the last `window` positions (0: all), within chunks of `chunk` positions (0: the row).

    `cuts`: by row where its documents begin, ascending, from 0; empty where rows are not packed.
    """

    window: int = 0
    chunk: int = 0
    cuts: Cuts = ()

    def packed(self, cuts: Cuts) -> Pattern:
        """The same for rows with documents."""
        return replace(self, cuts=cuts)

    def segments(self, row: int, width: int) -> tuple[tuple[int, int], ...]:
        """The (first, stop) of the segments of a row of `width` positions."""
        starts = {0, *(self.cuts[row] if self.cuts else ()), *range(0, width, self.chunk or width)}
        edges = [*sorted(s for s in starts if s < width), width]
        return tuple(pairwise(edges))

    def visible(self, first: int, stop: int, width: int) -> np.ndarray:
        """(stop - first, width) booleans of an unpacked row: whether a query of these may attend to a key."""
        query, key = np.arange(first, stop)[:, None], np.arange(width)[None]
        found = query >= key
        if self.window:
            found &= query - key < self.window
        if self.chunk:
            found &= query // self.chunk == key // self.chunk
        return found


def recognise(mask: object, width: int) -> Pattern | None:
    """The pattern of a mask that a model gives a layer for rows of `width` positions; None if it is another one.

    `mask`: "causal", or booleans whose last two dimensions are (width, width) and whose others are 1.
    """
    if isinstance(mask, str):
        return Pattern() if mask == CAUSAL else None
    if not isinstance(mask, mx.array) or mask.dtype != mx.bool_:
        return None
    if mask.size != width * width or tuple(mask.shape[-2:]) != (width, width):
        return None
    found = np.array(mask).reshape(width, width)
    seeing = int(found[:, 0].sum())  # queries that see the first key: the length of a window, or of a chunk
    if not seeing:
        return None
    candidates = [Pattern(window=seeing), Pattern(chunk=seeing)] if seeing < width else [Pattern()]
    return next((one for one in candidates if _is(one, found)), None)


def _is(pattern: Pattern, mask: np.ndarray) -> bool:
    width = len(mask)
    return all(
        np.array_equal(mask[a : a + _COMPARED], pattern.visible(a, min(a + _COMPARED, width), width))
        for a in range(0, width, _COMPARED)
    )


def telling_width(config: Mapping[str, Any], width: int) -> int:
    """A width, up to `width`, at which the masks of a model with this text configuration tell what they are at `width`.

    A mask of long rows has as many elements as their square; windows and chunks show behind their length.
    """
    lengths = [
        value
        for key, value in config.items()
        if any(word in key for word in ("window", "chunk")) and isinstance(value, int) and 0 < value < width
    ]
    return min(width, max(lengths, default=_COMPARED) + _COMPARED)


def cuts_of(documents: np.ndarray) -> Cuts:
    """(rows, width) document numbers, each document in one piece -> by row where its documents begin."""
    return tuple((0, *(np.flatnonzero(np.diff(row)) + 1).tolist()) for row in documents)
