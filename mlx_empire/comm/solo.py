"""The protocol in a world of one: the same meaning, rounding and checks, with nobody to wait for."""

import json
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from mlx_empire.comm.buffers import Adder, check_buffer, check_reduction
from mlx_empire.comm.protocol import Array, Pieces, SoloHeartbeat, Traffic, Wire


class SoloCommunicator:
    """`protocol.Communicator` of the only rank, 0."""

    def __init__(self, hostname: str) -> None:
        self.rank, self.size, self.hostname = 0, 1, hostname
        self.hostnames = [hostname]
        self.traffic = Traffic.between(1)
        self._adder = Adder()

    @property
    def staging_bytes(self) -> int:
        return self._adder.nbytes

    def all_gather(self, buffer: Array, edges: Sequence[int]) -> None:
        check_buffer(buffer, edges, self.size)

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
        total = check_reduction(0, contribution, edges, total, contributes, wire)
        self._adder.add(total, [contribution] if contributes[0] else [], wire, fresh=fresh)

    def scatter(self, source: Array | None, edges: Sequence[int], out: Array, root: int) -> None:
        assert source is not None, "the root needs a source"
        assert source.dtype == out.dtype, f"source is {source.dtype}, out {out.dtype}"
        check_buffer(source, edges, self.size)
        np.copyto(out, source)

    def transfer(self, sends: Sequence[tuple[int, Array]], receives: Sequence[tuple[int, Array]]) -> None:
        assert not sends, "there is nobody to send to"
        assert not receives, "there is nobody to receive from"

    def gather_arrays(self, values: Array) -> list[Array]:
        assert values.ndim == 1, "1-D arrays only"
        return [values.copy()]

    def broadcast_json(self, value: Any) -> Any:
        return json.loads(json.dumps(value))

    def gather_json(self, value: Any) -> list[Any]:
        return [json.loads(json.dumps(value))]

    def barrier(self, seconds: float) -> None:
        return None

    def heartbeat(self) -> SoloHeartbeat:
        return SoloHeartbeat()

    def duplicate(self, deadline_seconds: float) -> "SoloCommunicator":
        return SoloCommunicator(self.hostname)

    def abort(self, code: int) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        if threading.current_thread() is threading.main_thread():
            raise SystemExit(code)
        os._exit(code)
