"""The one loop that moves messages: non-blocking sends and receives, polled politely, with a deadline.

Decides when a message may be sent, how a late peer is waited for without burning a core, and when it counts as lost.

A stream from rank a to rank b goes through these phases:

1. grant    b posts its receives, as many as the stream's window has room for, and tells a their number (a credit of
            eight bytes). Credits go before b's own messages;
2. send     a posts the messages that are granted. The first needs no credit, so that a stream of one message (all of
            the control plane's short values) costs none;
3. go on    whenever messages have landed, b posts more receives and grants those.

MPI has a handshake of its own for large messages, and it makes a wire with two directions half duplex. A sender asks;
the answer travels on the same TCP connection as the receiver's own data, behind megabytes that it has been allowed to
send; when it is there the roles are changed. Measured over cards of 80 Mbit/s, exchanges took between 1.0 and 2.1 times
their time at random. A credit is given before there is anything to wait behind, and for a whole window at once; and a
message that MPI sends without asking (`plan.traffic.unasked_bytes`) has no handshake. Unasked messages without credits
would pile up in the memory of a rank that is late.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from mpi4py import MPI

from mlx_empire import progress
from mlx_empire.comm.messages import Stream
from mlx_empire.comm.protocol import Traffic
from mlx_empire.errors import LostRankError

CREDIT = 16  # added to the tag of an operation for its credits

# MPI's own blocking calls spin, which takes a core from the computation. Here a poll that finds nothing
# sleeps for a fiftieth of the time since something moved last: messages that follow one another are seen at
# once, and a peer that is late by 50 ms or more costs a thousand polls a second, about 1 % of a core.
SPIN_SECONDS = 100e-6
SLEEP_FRACTION = 0.02
LONGEST_SLEEP_SECONDS = 1e-3


def pause(idle_seconds: float) -> None:
    """Give the core away for a time that grows with the time already spent waiting."""
    if idle_seconds < SPIN_SECONDS:
        time.sleep(0)
    else:
        time.sleep(min(idle_seconds * SLEEP_FRACTION, LONGEST_SLEEP_SECONDS))


def _nothing() -> bool:
    return False


@dataclass
class Flight:
    """One posted message, or credit. land(): called when it has been moved; what was posted in its place."""

    request: MPI.Request
    land: Callable[[], "Flight | None"]


class Exchange:
    """Runs streams over one communicator, for one thread at a time.

    Between two ranks both sides must offer the same messages in the same order (MPI keeps the order of a
    pair's messages). Tags differ by operation: ranks that disagree on what comes next stop at the deadline
    and mix no data.

    deadline_seconds: how long nothing may move, counted from when nothing was under way here; without meaning while a
    watchdog looks after the peers. traffic: where to count bytes, if they are to be counted.
    """

    def __init__(
        self,
        communicator: MPI.Intracomm,
        hostnames: Sequence[str],
        deadline_seconds: float,
        traffic: Traffic | None = None,
    ) -> None:
        self._communicator = communicator
        self._hostnames = hostnames
        self._deadline = deadline_seconds
        self._traffic = traffic
        self._busy = threading.Lock()

    def run(
        self,
        name: str,
        tag: int,
        streams: Sequence[Stream],
        within_seconds: float | None = None,
        beside: Callable[[], bool] = _nothing,
    ) -> None:
        """Move all messages of all streams. `beside` is asked again and again: whether something is under way here
        for which messages may have to wait.

        Raises LostRankError naming the peers waited for: when nothing has moved for the deadline or, if
        `within_seconds` is given, when not everything has moved by then.
        """
        if not self._busy.acquire(blocking=False):
            raise RuntimeError(f"{name}: two threads use one communicator")
        try:
            self._run(name, tag, streams, within_seconds, beside)
        finally:
            self._busy.release()

    def _run(
        self,
        name: str,
        tag: int,
        streams: Sequence[Stream],
        within: float | None,
        beside: Callable[[], bool],
    ) -> None:
        receives, sends = [x for x in streams if not x.sends], [x for x in streams if x.sends]
        flights = [self._await_credit(stream, tag) for stream in sends if stream.granted < stream.count]
        start = moved = active = time.monotonic()  # `active`: when anything moved here or was under way
        while True:
            working = beside()
            for stream in (*receives, *sends):
                while stream.may_post:
                    flights.append(self._post(stream, tag))
                if not stream.sends and stream.posted > stream.granted:
                    flights.append(self._grant(stream, tag))
            if not flights and not working:
                assert all(stream.finished == stream.count for stream in streams), (
                    f"{name}: a message never became ready"
                )
                return
            completed = MPI.Request.Testsome([flight.request for flight in flights]) if flights else []
            if completed:
                posted = [flights[index].land() for index in sorted(completed)]
                landed = set(completed)
                flights = [flight for index, flight in enumerate(flights) if index not in landed]
                flights += [flight for flight in posted if flight is not None]
                moved = active = time.monotonic()
                progress.moved()
                continue
            now = time.monotonic()
            if working:
                active = now
            patient = progress.watched() or now - active <= self._deadline
            if not patient if within is None else now - start > within:
                raise LostRankError(self._lost(name, streams, self._deadline if within is None else within))
            pause(now - moved)

    def _post(self, stream: Stream, tag: int) -> Flight:
        message = stream.message(stream.posted).view(np.uint8)
        start = self._communicator.Isend if stream.sends else self._communicator.Irecv
        request = start([message, MPI.BYTE], stream.peer, tag)
        stream.posted += 1
        return Flight(request, partial(self._land, stream, stream.posted - 1, message.nbytes))

    def _land(self, stream: Stream, index: int, nbytes: int) -> None:
        if self._traffic is not None:
            counts = self._traffic.sent if stream.sends else self._traffic.received
            counts[stream.peer] += nbytes
        stream.complete(index)

    def _grant(self, stream: Stream, tag: int) -> Flight:
        stream.granted = stream.posted
        credit = np.array([stream.posted], np.int64)
        request = self._communicator.Isend([credit.view(np.uint8), MPI.BYTE], stream.peer, tag + CREDIT)
        return Flight(request, lambda: None)

    def _await_credit(self, stream: Stream, tag: int) -> Flight:
        credit = np.empty(1, np.int64)

        def land() -> Flight | None:
            stream.granted = int(credit[0])
            return self._await_credit(stream, tag) if stream.granted < stream.count else None

        return Flight(
            self._communicator.Irecv([credit.view(np.uint8), MPI.BYTE], stream.peer, tag + CREDIT), land
        )

    def _lost(self, name: str, streams: Sequence[Stream], seconds: float) -> str:
        """Blame the ranks from which something is missing; if there are none, those that do not take ours."""
        unfinished = [stream for stream in streams if stream.finished < stream.count]
        silent = {stream.peer for stream in unfinished if not stream.sends} or {
            stream.peer for stream in unfinished
        }
        peers = ", ".join(f"rank {peer} on {self._hostnames[peer]}" for peer in sorted(silent))
        return f"{name}: waited {seconds:g} s for {peers}; look at that machine and its network, then restart"
