"""Decides which rows are read at which positions of a run: shuffled epochs, the file's order, or sources mixed.

Position p = step * global_size + k. What is read there is a pure function of seed and position, blind to the number of
ranks, to micro-batches and to what was read before. So any step can be computed alone, and a run resumes anywhere on
any number of machines.

*Shuffled*: epoch e is a permutation of the n rows; position p reads row p mod n of epoch p div n. *In the file's
order*: each epoch is as the file has it. *Mixed*: each position draws a source by weight among those that are open at
its step, and reads the next row of that source's own epochs, as if that were read alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import accumulate
from typing import Protocol

import numpy as np

from mlx_empire.recipe.mixture import DataSource, Period, periods
from mlx_empire.recipe.sections import DataSection

FIXED_SEED = 0x656D70697265  # for shuffles that belong to the data and must not follow run.seed
# Second words of the key of the random stream: below, a source's epochs; this, which source is drawn.
EPOCHS_PER_SOURCE = 2**40
CHOICES = 2**64 - 1
BLOCK = (
    2**14
)  # positions whose sources are drawn at once; how many of each came before is known at every block


class Order(Protocol):
    """Which rows are read when."""

    def rows_at(self, first: int, count: int) -> np.ndarray:
        """The row indices (count,) int64 at positions first, first + 1, ..."""
        ...


def epoch_order(rows: int, seed: int, epoch: int, source: int = 0) -> np.ndarray:
    """The permutation (rows,) int64 of an epoch of a source, from Philox-4x64-10 keyed with (seed, epoch).

    Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.

    The raw 64-bit stream is sorted rather than handed to `Generator.permutation`: numpy promises that raw
    streams stay the same from version to version, but not what its Generator makes of them (NEP 19).
    """
    key = _key(seed, source * EPOCHS_PER_SOURCE + epoch)
    order = np.argsort(np.random.Philox(key=key).random_raw(rows), kind="stable")
    order.setflags(write=False)
    return order


def fixed_permutation(count: int) -> np.ndarray:
    """A permutation (count,) int64 that is the same in every run, whatever its seed."""
    return epoch_order(count, FIXED_SEED, 0)


def reading_order(
    section: DataSection, lengths: Sequence[int], seed: int, global_size: int, steps: int
) -> Order:
    """How a run of `steps` steps of `global_size` rows reads its data; `lengths`: the rows of each path."""
    each: list[Order] = [
        InFileOrder(rows) if section.order == "file" else Shuffled(rows, seed, source)
        for source, rows in enumerate(lengths)
    ]
    if not section.sources:
        return each[0]
    return Mixed(section.sources, each, lengths, seed, global_size, steps)


@dataclass(frozen=True)
class Shuffled:
    """Endless epochs of so many rows, each in an order of its own."""

    rows: int
    seed: int
    source: int = 0

    def rows_at(self, first: int, count: int) -> np.ndarray:
        """As `Order.rows_at`."""
        positions = np.arange(first, first + count)
        epochs, places = positions // self.rows, positions % self.rows
        return np.concatenate([self._epoch(int(one))[places[epochs == one]] for one in np.unique(epochs)])

    @cached_property
    def _epoch(self) -> Callable[[int], np.ndarray]:
        # Two, for a step may lie in both.
        return lru_cache(maxsize=2)(partial(epoch_order, self.rows, self.seed, source=self.source))


@dataclass(frozen=True)
class InFileOrder:
    """Endless epochs of so many rows, each as they lie there."""

    rows: int

    def rows_at(self, first: int, count: int) -> np.ndarray:
        """As `Order.rows_at`."""
        return np.arange(first, first + count) % self.rows


class Mixed:
    """Sources that lie one after the other, `lengths` rows each, read in turn as a counter-based stream draws them.

    Word p of Philox keyed with (seed, `CHOICES`) decides for position p. How many rows of each source were read before
    is counted block by block: the first look at position 10^9 takes seconds, and every other at once. Beyond the
    run's end the sources of its last period go on.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        orders: Sequence[Order],
        lengths: Sequence[int],
        seed: int,
        global_size: int,
        steps: int,
    ) -> None:
        self._orders, self._seed = orders, seed
        self._offsets = [0, *accumulate(lengths)]
        self._periods = _by_position(periods(sources), global_size, steps)
        self._before = [np.zeros(len(orders), np.int64)]
        self._block = lru_cache(maxsize=4)(self._numbered)

    def rows_at(self, first: int, count: int) -> np.ndarray:
        """As `Order.rows_at`."""
        blocks = range(first // BLOCK, -(-(first + count) // BLOCK))
        start = first - blocks.start * BLOCK
        parts = [self._block(block) for block in blocks]
        chosen, numbers = (np.concatenate(one)[start : start + count] for one in zip(*parts, strict=True))
        rows = np.empty(count, np.int64)
        for source in np.unique(chosen):
            here = chosen == source  # their numbers follow one another
            own = self._orders[source].rows_at(int(numbers[here][0]), int(here.sum()))
            rows[here] = self._offsets[source] + own
        return rows

    def _numbered(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources (BLOCK,) of a block's positions, and which of its source's rows each is, from the run's start."""
        chosen, before = self._drawn(block), self._drawn_before(block)
        numbers = np.empty(BLOCK, np.int64)
        for source in range(len(self._orders)):
            here = np.flatnonzero(chosen == source)
            numbers[here] = before[source] + np.arange(len(here))
        return chosen, numbers

    def _drawn_before(self, block: int) -> np.ndarray:
        for one in range(len(self._before) - 1, block):
            counts = self._before[-1].copy()
            for _, words, sources, bounds in self._words(one):  # only counted, which is ten times as fast
                above = np.array([len(words), *(np.count_nonzero(words >= bound) for bound in bounds), 0])
                counts[sources] -= np.diff(above)
            self._before.append(counts)
        return self._before[block]

    def _drawn(self, block: int) -> np.ndarray:
        """The sources (BLOCK,) int64 of a block's positions."""
        chosen = np.empty(BLOCK, np.int64)
        for part, words, sources, bounds in self._words(block):
            chosen[part] = sources[np.searchsorted(bounds, words, side="right")]
        return chosen

    def _words(self, block: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
        """The periods that a block's positions lie in: which of them, their words, sources and bounds."""
        start = block * BLOCK
        # Philox makes four words at each value of its counter.
        words = np.random.Philox(key=_key(self._seed, CHOICES), counter=start // 4).random_raw(BLOCK)
        for first, last, sources, bounds in self._periods:
            part = slice(max(first - start, 0), min(last - start, BLOCK))
            if part.start < part.stop:
                yield part, words[part], sources, bounds


def _by_position(
    found: Sequence[Period], global_size: int, steps: int
) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
    """Each period as its positions, from one up to another, its sources, and bounds: a word below the first of them
    draws the first source, and so on."""
    made = []
    for one in found:
        first, last = (step * global_size for step in one.steps(steps))
        total = sum(one.weights.values())
        bounds = [int(part * 2**64 / total) for part in accumulate(one.weights.values())][:-1]
        made.append((first, last, np.array(list(one.weights)), np.array(bounds, np.uint64)))
    made = [one for one in made if one[0] < one[1]]
    first, _, sources, numbers = made[-1]
    return [*made[:-1], (first, 2**63 - 1, sources, numbers)]


def _key(seed: int, stream: int) -> np.ndarray:
    return np.array([seed % 2**64, stream], dtype=np.uint64)
