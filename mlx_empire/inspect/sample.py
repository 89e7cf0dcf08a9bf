"""Decides which rows stand for all: a fair sample of fixed size, drawn in one pass over rows whose number nobody knows.

A row's rank is a hash of its place, so that the same rows are drawn whatever the machine, the day and what comes after
them; those of the lowest rank are kept. The first row is always among them, because a person compares it with the file.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from hashlib import blake2b
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairSample(Generic[Item]):
    """At most `size` items, of which nothing but those that are kept is ever made."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: list[tuple[int, int, Item]] = []  # the heap's top is the one that goes first

    def offer(self, place: int, make: Callable[[], Item]) -> None:
        """The item at `place` (0, 1, ...; each once), made where it is kept for now."""
        rank = -int.from_bytes(blake2b(place.to_bytes(8), digest_size=7).digest()) if place else 0
        if len(self._kept) < self._size:
            heapq.heappush(self._kept, (rank, place, make()))
        elif self._kept and rank > self._kept[0][0]:
            heapq.heapreplace(self._kept, (rank, place, make()))

    def items(self) -> list[tuple[int, Item]]:
        """What is kept, with its place, in the order of the places."""
        return [(place, item) for _, place, item in sorted(self._kept, key=lambda kept: kept[1])]
