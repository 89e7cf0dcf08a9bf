"""One uneven reduce-scatter as streams: what is packed, where it lands and when it is added; no MPI here.

Decides the order of additions (that of the ranks, whatever the order of arrival) and how much is staged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_empire import progress
from mlx_empire.comm.accumulate import WIRE_DTYPES, Adder, copy_interval, overlaps, window
from mlx_empire.comm.messages import Bucket, Stream, cut_into_buckets
from mlx_empire.comm.protocol import Array, Pieces, Wire

SLOTS = 2  # staging buffers per peer and direction at least: one is filled while the other one is emptied


class Staging:
    """Byte buffers that are kept between operations; each grows to the largest message it ever held."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int, int], Array] = {}

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def take(self, purpose: str, peer: int, slot: int, size: int, wire: Wire) -> Array:
        """An uninitialised array of `size` elements, in a slot."""
        dtype = WIRE_DTYPES[wire]
        key = purpose, peer, slot
        buffer = self._buffers.get(key)
        if buffer is None or buffer.nbytes < size * dtype.itemsize:
            buffer = self._buffers[key] = np.empty(size * dtype.itemsize, np.uint8)
        return buffer[: size * dtype.itemsize].view(dtype)


@dataclass
class ReduceScatter:
    """The state of one reduce-scatter on one rank. `total` is the own interval, float32; `slots`: buckets in flight
    from and for every peer."""

    rank: int
    contribution: Pieces
    edges: Sequence[int]
    total: Array
    contributes: Sequence[bool]
    wire: Wire
    bucket_bytes: int
    staging: Staging
    adder: Adder
    slots: int = SLOTS

    def __post_init__(self) -> None:
        self.buckets = self._cut(self.rank)
        self.added = 0  # own buckets whose sum is complete
        self.arrived: dict[int, int] = {}  # own buckets received, by contributing peer

    def streams(self) -> list[Stream]:
        size = len(self.contributes)
        peers = [(self.rank + step) % size for step in range(1, size)]
        contributors = [peer for peer in peers if self.contributes[peer]]
        self.arrived = dict.fromkeys(contributors, 0)
        streams = [self._receive(peer) for peer in contributors]
        return streams + [self._send(peer) for peer in peers] if self.contributes[self.rank] else streams

    def add_arrived(self) -> None:
        """Add every bucket to which all contributions have come; all of them where no peer contributes."""
        while self.added < len(self.buckets) and all(count > self.added for count in self.arrived.values()):
            low, high = self.buckets[self.added]
            start = self.edges[self.rank]
            contributions = [
                self._values(source, low, high) for source, flag in enumerate(self.contributes) if flag
            ]
            self.adder.add(self.total[low - start : high - start], contributions, self.wire)
            self.added += 1

    def _values(self, source: int, low: int, high: int) -> Pieces:
        if source == self.rank:
            return list(overlaps(self.contribution, low, high))
        return [(0, self.staging.take("received", source, self.added % self.slots, high - low, self.wire))]

    def _receive(self, peer: int) -> Stream:
        def message(k: int) -> Array:
            low, high = self.buckets[k]
            return self.staging.take("received", peer, k % self.slots, high - low, self.wire)

        def done(k: int) -> None:
            if not any(self.arrived.values()):
                progress.reach("reduce-middle")
            self.arrived[peer] = k + 1
            self.add_arrived()

        def ready(k: int) -> bool:
            return k < self.added + self.slots

        return Stream(peer, False, len(self.buckets), message, ready, done, window=self.slots)

    def _send(self, peer: int) -> Stream:
        """Straight from the gradient where one piece covers the bucket, else packed."""
        buckets = self._cut(peer)

        def message(k: int) -> Array:
            low, high = buckets[k]
            whole = window(self.contribution, low, high)
            if whole is not None:
                return whole
            packed = self.staging.take("packed", peer, k % self.slots, high - low, self.wire)
            return copy_interval(self.contribution, low, high, packed)

        return Stream(peer, True, len(buckets), message, window=self.slots)

    def _cut(self, owner: int) -> list[Bucket]:
        itemsize = WIRE_DTYPES[self.wire].itemsize
        return cut_into_buckets(self.edges[owner], self.edges[owner + 1], itemsize, self.bucket_bytes)
