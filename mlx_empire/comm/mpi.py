"""The protocol over MPI: hands the streams of each operation to the exchange of its plane (see `protocol`)."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
from mpi4py import MPI

from mlx_empire import progress
from mlx_empire.comm.buffers import Adder, check_buffer, check_reduction
from mlx_empire.comm.exchange import Exchange
from mlx_empire.comm.messages import (
    SLOTS,
    Bucket,
    ReduceScatter,
    Staging,
    Stream,
    cut_into_buckets,
    direct_streams,
    flat_stream,
    queue_stream,
    relay_streams,
)
from mlx_empire.comm.protocol import Array, Pieces, Traffic, Wire
from mlx_empire.plan.traffic import (
    PIECE_BYTES,
    UNASKED_FACT,
    Route,
    agreed_unasked_bytes,
    resolve_route,
    unasked_bytes,
)

HEARTBEAT_TAG = 6
MAX_HEARTBEAT_BYTES = 4096


class MpiHeartbeat:
    """`Heartbeat` over a duplicate of the world's communicator."""

    def __init__(self, communicator: MPI.Intracomm) -> None:
        self._communicator = communicator
        self._peers = [rank for rank in range(communicator.size) if rank != communicator.rank]
        self._flights: dict[int, list[tuple[MPI.Request, Any]]] = {}  # with the data, which must live as long

    def send(self, message: Any, *, last: bool = False) -> None:
        """See `Heartbeat`."""
        data = np.frombuffer(json.dumps(message).encode(), np.uint8)
        assert data.size <= MAX_HEARTBEAT_BYTES
        for peer in self._peers:
            if last or all(request.Test() for request, _ in self._flights.get(peer, [])):
                request = self._communicator.Isend([data, MPI.BYTE], peer, HEARTBEAT_TAG)
                self._flights[peer] = [*(self._flights.get(peer, []) if last else []), (request, data)]

    def receive(self) -> list[tuple[int, Any]]:
        """See `Heartbeat`."""
        found = []
        status = MPI.Status()
        while self._communicator.Iprobe(MPI.ANY_SOURCE, HEARTBEAT_TAG, status):
            data = np.empty(status.Get_count(MPI.BYTE), np.uint8)
            self._communicator.Recv([data, MPI.BYTE], status.Get_source(), HEARTBEAT_TAG)
            found.append((status.Get_source(), json.loads(data.tobytes())))
        return found


GATHER, REDUCE, SCATTER, CONTROL, TRANSFER = 1, 2, 3, 4, 5  # message tags
ABORT_SECONDS = 10.0


class MpiCommunicator:
    """`protocol.Communicator` over two duplicates of a communicator, one for each plane.

    route: the way of every gather. bucket_bytes: the largest message, below 2^31; between machines buckets travel in
    pieces. deadline_seconds: how long nothing may move before a peer counts as lost.
    """

    def __init__(
        self, world: MPI.Intracomm, hostname: str, route: Route, bucket_bytes: int, deadline_seconds: float
    ) -> None:
        self.rank, self.size, self.hostname = world.rank, world.size, hostname
        self.traffic = Traffic.between(self.size)
        self._world = world
        self._route = route
        self._bucket_bytes = bucket_bytes
        self._staging = Staging()
        self._adder = Adder()
        self._control_thread: int | None = threading.get_ident()
        self.hostnames = ["unknown host"] * self.size
        self._control = Exchange(world.Dup(), self.hostnames, deadline_seconds)
        self._data = Exchange(world.Dup(), self.hostnames, deadline_seconds, self.traffic)
        self._slots, self._piece_bytes = SLOTS, bucket_bytes
        self.hostnames[:] = self.gather_json(hostname)
        if len(set(self.hostnames)) > 1:
            answers = self.gather_json({UNASKED_FACT: unasked_bytes(os.environ)})
            self._piece_bytes = min(bucket_bytes, PIECE_BYTES, agreed_unasked_bytes(answers))
            self._slots = SLOTS * bucket_bytes // self._piece_bytes

    @property
    def staging_bytes(self) -> int:
        return self._staging.nbytes + self._adder.nbytes

    # ---- data plane ----

    def all_gather(self, buffer: Array, edges: Sequence[int]) -> None:
        check_buffer(buffer, edges, self.size)
        buckets = [self._cut(*interval, buffer) for interval in pairwise(edges)]
        streams = relay_streams if resolve_route(self._route, edges) == "relay" else direct_streams
        self._move("all-gather", GATHER, streams(buffer, buckets, self.rank))

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
        total = check_reduction(self.rank, contribution, edges, total, contributes, wire)
        reduction = ReduceScatter(
            self.rank,
            contribution,
            edges,
            total,
            contributes,
            wire,
            self._piece_bytes,
            self._staging,
            self._adder,
            self._slots,
            fresh,
        )
        self._data.run("reduce-scatter", REDUCE, reduction.streams(), beside=reduction.add_arrived)
        reduction.finish()

    def scatter(self, source: Array | None, edges: Sequence[int], out: Array, root: int) -> None:
        low, high = edges[self.rank], edges[self.rank + 1]
        assert out.shape == (high - low,), "out: 1-D, the own interval"
        assert out.flags.c_contiguous, "out: contiguous"
        if self.rank != root:
            self._move("scatter", SCATTER, [flat_stream(root, False, out, self._cut(0, high - low, out))])
            return
        assert source is not None, "the root needs a source"
        assert source.dtype == out.dtype, f"source is {source.dtype}, out {out.dtype}"
        check_buffer(source, edges, self.size)
        buckets = [self._cut(*interval, source) for interval in pairwise(edges)]
        streams = [
            flat_stream(peer, True, source, buckets[peer]) for peer in range(self.size) if peer != root
        ]
        self._move("scatter", SCATTER, streams)
        np.copyto(out, source[low:high])

    def transfer(self, sends: Sequence[tuple[int, Array]], receives: Sequence[tuple[int, Array]]) -> None:
        streams = []
        for peer in range(self.size):
            for outgoing, messages in ((False, receives), (True, sends)):
                buffers = [buffer for other, buffer in messages if other == peer and buffer.size]
                assert peer != self.rank or not buffers, "a rank does not send to itself"
                if buffers:
                    streams.append(queue_stream(peer, outgoing, buffers, self._piece_bytes))
        self._move("transfer", TRANSFER, streams)

    def _cut(self, low: int, high: int, buffer: Array) -> list[Bucket]:
        return cut_into_buckets(low, high, buffer.itemsize, self._piece_bytes)

    def _move(self, name: str, tag: int, streams: Sequence[Stream]) -> None:
        """Run streams that need no staging: at least as much may be in flight as of a reduction."""
        for stream in streams:
            stream.window = max(stream.window, self._slots)
        self._data.run(name, tag, streams)

    # ---- control plane ----

    def gather_arrays(self, values: Array) -> list[Array]:
        assert values.ndim == 1, "1-D arrays only"
        return [
            np.frombuffer(data, values.dtype).copy()
            for data in self._swap("gather of values", values.tobytes())
        ]

    def broadcast_json(self, value: Any) -> Any:
        own = json.dumps(value).encode() if self.rank == 0 else b""
        return json.loads(self._swap("broadcast", own)[0])

    def gather_json(self, value: Any) -> list[Any]:
        return [json.loads(data) for data in self._swap("gather", json.dumps(value).encode())]

    def barrier(self, seconds: float) -> None:
        self._swap("barrier", b"", seconds)

    def heartbeat(self) -> MpiHeartbeat:
        return MpiHeartbeat(self._world.Dup())

    def duplicate(self, deadline_seconds: float) -> MpiCommunicator:
        other = MpiCommunicator(self._world, self.hostname, self._route, self._bucket_bytes, deadline_seconds)
        other._control_thread = None
        return other

    def abort(self, code: int) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        last_resort = threading.Timer(ABORT_SECONDS, os._exit, (code,))
        last_resort.daemon = True
        last_resort.start()
        self._world.Abort(code)

    def _swap(self, name: str, own: bytes, within_seconds: float | None = None) -> list[bytes]:
        """Every rank's bytes, in rank order: first all lengths, which say who has come, then the bytes."""
        if self._control_thread is None:  # a duplicate belongs to the thread that uses it first
            self._control_thread = threading.get_ident()
        assert threading.get_ident() == self._control_thread, f"{name}: only for the thread that connected"
        with progress.waiting():
            return self._swap_waiting(name, own, within_seconds)

    def _swap_waiting(self, name: str, own: bytes, within_seconds: float | None) -> list[bytes]:
        lengths = np.zeros(self.size, np.int64)
        lengths[self.rank] = len(own)
        each = [[(rank, rank + 1)] for rank in range(self.size)]
        self._control.run(name, CONTROL, direct_streams(lengths, each, self.rank), within_seconds)
        edges = np.concatenate([[0], np.cumsum(lengths)]).tolist()
        buffer = np.empty(edges[-1], np.uint8)
        buffer[edges[self.rank] : edges[self.rank + 1]] = np.frombuffer(own, np.uint8)
        buckets = [self._cut(*interval, buffer) for interval in pairwise(edges)]
        self._control.run(name, CONTROL, direct_streams(buffer, buckets, self.rank), within_seconds)
        return [buffer[low:high].tobytes() for low, high in pairwise(edges)]
