"""Small messages between the watchdogs of all ranks, on a communicator of their own.

Decides that nobody ever blocks: messages are looked for before they are received, and a peer that has not taken the
last one is sent nothing new.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from mpi4py import MPI

TAG = 6
MAX_BYTES = 4096


class MpiHeartbeat:
    """`Heartbeat` over a duplicate of the world's communicator."""

    def __init__(self, communicator: MPI.Intracomm) -> None:
        self._communicator = communicator
        self._peers = [rank for rank in range(communicator.size) if rank != communicator.rank]
        self._flights: dict[int, list[tuple[MPI.Request, Any]]] = {}  # with the data, which must live as long

    def send(self, message: Any, *, last: bool = False) -> None:
        """See `Heartbeat`."""
        data = np.frombuffer(json.dumps(message).encode(), np.uint8)
        assert data.size <= MAX_BYTES
        for peer in self._peers:
            if last or all(request.Test() for request, _ in self._flights.get(peer, [])):
                request = self._communicator.Isend([data, MPI.BYTE], peer, TAG)
                self._flights[peer] = [*(self._flights.get(peer, []) if last else []), (request, data)]

    def receive(self) -> list[tuple[int, Any]]:
        """See `Heartbeat`."""
        found = []
        status = MPI.Status()
        while self._communicator.Iprobe(MPI.ANY_SOURCE, TAG, status):
            data = np.empty(status.Get_count(MPI.BYTE), np.uint8)
            self._communicator.Recv([data, MPI.BYTE], status.Get_source(), TAG)
            found.append((status.Get_source(), json.loads(data.tobytes())))
        return found
