"""Which messages a gather or a scatter consists of, as ordered streams between two ranks; no MPI here.

Decides the buckets into which intervals are cut, the order in which a relay passes them on, and that nothing is sent
but what the other side has said it waits for (`exchange` tells why).

A reduce-scatter's streams also say what is packed, where it lands and when it is added: in the order of the ranks,
whatever the order of arrival.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from mlx_empire import progress
from mlx_empire.comm.buffers import WIRE_DTYPES, Adder, copy_interval, overlaps, window
from mlx_empire.comm.protocol import Array, Pieces, Wire

Bucket = tuple[int, int]  # elements [low, high) of a flat buffer
UNASKED = 1  # messages of a stream that are sent before the receiver has said anything; a short stream needs no credit


def _always(_: int) -> bool:
    return True


def _nothing(_: int) -> None:
    return None


@dataclass
class Stream:
    """One ordered stream of `count` messages to (`sends`) or from one peer, and how far it has come.

    message(k): contiguous 1-D array of message k, asked for when it is posted, which is not before ready(k).
    done(k): called once for each message, in order. window: how many may be in flight. granted: for how many
    messages from the first on the receiver has said (or, as the receiver: has told the sender) that it is ready.
    """

    peer: int
    sends: bool
    count: int
    message: Callable[[int], Array]
    ready: Callable[[int], bool] = _always
    done: Callable[[int], None] = _nothing
    window: int = 8
    granted: int = UNASKED
    posted: int = 0
    finished: int = 0
    early: set[int] = field(default_factory=set)  # complete, while one before it is not

    @property
    def may_post(self) -> bool:
        room = self.posted < self.count and self.posted - self.finished < self.window
        return room and not (self.sends and self.posted >= self.granted) and self.ready(self.posted)

    def complete(self, index: int) -> None:
        """Message `index` has been moved."""
        self.early.add(index)
        while self.finished in self.early:
            self.early.remove(self.finished)
            self.done(self.finished)
            self.finished += 1


def cut_into_buckets(low: int, high: int, itemsize: int, bucket_bytes: int) -> list[Bucket]:
    """[low, high) elements in buckets of at most `bucket_bytes`, but at least one element."""
    step = max(1, bucket_bytes // itemsize)
    return [(first, min(high, first + step)) for first in range(low, high, step)]


def flat_stream(peer: int, sends: bool, buffer: Array, buckets: Sequence[Bucket]) -> Stream:
    """Moves these buckets of one flat buffer, straight from or into it."""

    def message(k: int) -> Array:
        low, high = buckets[k]
        return buffer[low:high]

    return Stream(peer, sends, len(buckets), message)


def queue_stream(peer: int, sends: bool, buffers: Sequence[Array], bucket_bytes: int) -> Stream:
    """Moves several buffers one after the other."""
    pieces = [(b, *piece) for b in buffers for piece in cut_into_buckets(0, b.size, b.itemsize, bucket_bytes)]

    def message(k: int) -> Array:
        buffer, low, high = pieces[k]
        return buffer[low:high]

    return Stream(peer, sends, len(pieces), message)


def direct_streams(buffer: Array, buckets: Sequence[list[Bucket]], rank: int) -> list[Stream]:
    """The own buckets to every peer, every peer's buckets from it. buckets: by owner."""
    peers = [(rank + step) % len(buckets) for step in range(1, len(buckets))]
    receives = [flat_stream(peer, False, buffer, buckets[peer]) for peer in peers]
    return receives + [flat_stream(peer, True, buffer, buckets[rank]) for peer in peers]


def relay_streams(buffer: Array, buckets: Sequence[list[Bucket]], rank: int) -> list[Stream]:
    """From the previous rank everything but the own buckets, the nearest owner's first; to the next rank
    the own buckets and then, as they arrive, those same ones but for the last owner's: that owner is the
    next rank.

    Both sides thus have one and the same order, and a link always has something to carry: the pieces that a
    rank passes on arrive while it is still sending its own.
    """
    size = len(buckets)
    if size == 1:
        return []
    owners = [(rank - step) % size for step in range(1, size)]
    own = buckets[rank]
    receive = flat_stream(owners[0], False, buffer, [b for owner in owners for b in buckets[owner]])
    send = flat_stream(owners[-1], True, buffer, own + [b for owner in owners[:-1] for b in buckets[owner]])
    send.ready = lambda k: k - len(own) < receive.finished
    return [receive, send]


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
    from and for every peer; `fresh`: the total counts as zeros."""

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
    fresh: bool = False

    def __post_init__(self) -> None:
        self.buckets = self._cut(self.rank)
        self.begun = 0  # own buckets that are being added, or have been
        self.added = 0  # own buckets whose sum is complete, and that of all before them
        self.adding: deque[list[Future[None]]] = deque()  # those between, by what their threads add
        self.arrived: dict[int, int] = {}  # own buckets received, by contributing peer

    def streams(self) -> list[Stream]:
        size = len(self.contributes)
        peers = [(self.rank + step) % size for step in range(1, size)]
        contributors = [peer for peer in peers if self.contributes[peer]]
        self.arrived = dict.fromkeys(contributors, 0)
        streams = [self._receive(peer) for peer in contributors]
        return streams + [self._send(peer) for peer in peers] if self.contributes[self.rank] else streams

    def add_arrived(self) -> bool:
        """Begin to add the buckets to which all contributions have come; whether any is being added.

        Threads add while the exchange goes on. A bucket's memory takes the next one when its sum is complete.
        """
        while self.arrived and self.begun < min(len(self.buckets), *self.arrived.values()):
            low, high = self.buckets[self.begun]
            self.adding.append(self.adder.begin(*self._sum(low, high), self.wire, fresh=self.fresh))
            self.begun += 1
        while self.adding and all(run.done() for run in self.adding[0]):
            for run in self.adding.popleft():
                run.result()
            progress.moved()
            self.added += 1
        return bool(self.adding)

    def finish(self) -> None:
        """After the exchange, which goes on as long as anything is being added: the sum where no peer contributes."""
        assert not self.adding
        if not self.arrived and self.buckets:
            own = self._sum(self.edges[self.rank], self.edges[self.rank + 1])
            self.adder.add(*own, self.wire, fresh=self.fresh)

    def _sum(self, low: int, high: int) -> tuple[Array, list[Pieces]]:
        """The total of [low, high), and the contributions to it in the order of the ranks."""
        start = self.edges[self.rank]
        sources = [source for source, flag in enumerate(self.contributes) if flag]
        return self.total[low - start : high - start], [self._values(s, low, high) for s in sources]

    def _values(self, source: int, low: int, high: int) -> Pieces:
        if source == self.rank:
            return list(overlaps(self.contribution, low, high))
        return [(0, self.staging.take("received", source, self.begun % self.slots, high - low, self.wire))]

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
