"""What the rest of the program may ask of the other ranks, and in which order it happens.

Two planes, each with a communicator of its own, so that they may run at the same time:

  data plane     `all_gather`, `reduce_scatter`, `scatter`, `transfer`: large flat numpy buffers, views of *evaluated*
                 arrays. Called by one thread only (`thread.CommThread`), by all ranks in the same order.
                 Payload is counted in `traffic`; `plan.traffic` predicts it to the byte.
  control plane  `gather_arrays`, `broadcast_json`, `gather_json`, `barrier`: small values. Called by the
                 thread that connected, by all ranks in the same order. Values travel as raw bytes or JSON,
                 never as pickle.

Buffers hold the concatenation of all ranks' intervals. `edges` are the N + 1 borders in elements: rank r owns
[edges[r], edges[r + 1]), of any length, also none. The phases of the data plane, for a rank r:

  all_gather      direct: send the own interval to every rank, receive every other interval in place.
                  relay: send the own interval to rank r + 1, then pass on what comes from rank r - 1, piece
                  by piece as it arrives, except the interval that r + 1 owns. Nothing is staged.
  reduce_scatter  cut every interval into buckets; pack each bucket where it has gaps, send it to its owner;
                  receive the others' contributions to the own buckets into staging buffers, two buckets
                  deep; when all have come to one, add them to the fp32 total in rank order, the own one at
                  its place.
  scatter         the root sends each owner its interval.
  transfer        any buffers from any rank to any other; both sides name them in the same order.

bfloat16 is unknown to numpy: it travels as uint16 and is named by `wire`. Every operation raises `LostRankError` when
nothing has moved for the deadline, unless a watchdog (`watchdog`) runs, which knows more about the others than that;
the job cannot go on after that.

Beside them a watchdog has a way of its own to the other ranks: `Heartbeat`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, Protocol

import numpy as np


class Heartbeat(Protocol):
    """Sends to, and receives from, all other ranks; for one thread."""

    def send(self, message: Any, *, last: bool = False) -> None:
        """JSON to everyone; a peer that has not taken the one before gets none, unless it is the last."""

    def receive(self) -> list[tuple[int, Any]]:
        """(rank, message) of all that has come."""


class SoloHeartbeat:
    """`Heartbeat` of the only rank."""

    def send(self, message: Any, *, last: bool = False) -> None:
        """Nobody listens."""

    def receive(self) -> list[tuple[int, Any]]:
        """Nobody talks."""
        return []


Wire = Literal["float32", "bfloat16", "float16"]
Array = np.ndarray[Any, Any]
Pieces = Sequence[
    tuple[int, Array]
]  # (first element in the flat buffer, 1-D values), ascending; gaps are zeros


@dataclass
class Traffic:
    """Payload bytes of the data plane since the start, by peer; the entry of the own rank stays 0."""

    sent: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)

    @classmethod
    def between(cls, size: int) -> Traffic:
        return cls([0] * size, [0] * size)

    def snapshot(self) -> Traffic:
        return Traffic(list(self.sent), list(self.received))

    def since(self, earlier: Traffic) -> Traffic:
        """What was moved after `earlier`, a snapshot."""
        return Traffic(
            [now - then for now, then in zip(self.sent, earlier.sent, strict=True)],
            [now - then for now, then in zip(self.received, earlier.received, strict=True)],
        )


class Communicator(Protocol):
    """The world of `size` ranks as rank `rank` sees it; the module's docstring explains planes and phases."""

    rank: int
    size: int
    hostname: str
    hostnames: list[str]  # by rank
    traffic: Traffic

    @property
    def staging_bytes(self) -> int:
        """Bytes of the numpy buffers that the data plane keeps for itself; they only grow."""

    def all_gather(self, buffer: Array, edges: Sequence[int]) -> None:
        """Fill `buffer` with every rank's interval.

        buffer: 1-D, contiguous, edges[-1] elements of any dtype; the own interval is already there.
        """

    def reduce_scatter(
        self,
        contribution: Pieces,
        edges: Sequence[int],
        total: Array | None,
        contributes: Sequence[bool],
        wire: Wire = "float32",
        *,
        fresh: bool = False,
    ) -> None:
        """total += contribution of rank 0, 1, .. N-1, one after the other in fp32, of the ranks that
        contribute. `fresh`: total counts as zeros, whatever it holds.

        contribution: this rank's whole flat buffer as pieces of the wire's dtype; ignored unless it
        contributes. total: float32, 1-D, of the length of the own interval; None stands for an empty
        interval. contributes: one flag per rank, the same list on all ranks.
        """

    def scatter(self, source: Array | None, edges: Sequence[int], out: Array, root: int) -> None:
        """out = the own interval of the root's `source`.

        source: 1-D, edges[-1] elements, on the root; None elsewhere. out: 1-D, same dtype, the own
        interval's length.
        """

    def transfer(self, sends: Sequence[tuple[int, Array]], receives: Sequence[tuple[int, Array]]) -> None:
        """Send each (peer, buffer), fill each (peer, buffer); 1-D contiguous buffers of any dtype.

        Of what goes from one rank to another both name the same lengths in the same order.
        """

    def gather_arrays(self, values: Array) -> list[Array]:
        """Every rank's 1-D array, in rank order; lengths may differ, the dtype may not."""

    def broadcast_json(self, value: Any) -> Any:
        """Rank 0's value on every rank, as JSON gives it back (also on rank 0: tuples are lists, keys
        strings)."""

    def gather_json(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, as JSON gives it back."""

    def barrier(self, seconds: float) -> None:
        """Return when all ranks have called it; LostRankError naming those that have not within `seconds`."""

    def heartbeat(self) -> Heartbeat:
        """Messages between the watchdogs, on a communicator of their own. Collective, control plane."""

    def duplicate(self, deadline_seconds: float) -> Communicator:
        """The same ranks with planes of their own, for one other thread. Collective, control plane."""

    def abort(self, code: int) -> NoReturn:
        """End every rank now; mpirun returns `code`."""
