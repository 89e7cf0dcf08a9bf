"""Whether the collectives give right answers here, asked with a few kilobytes before anything depends on them.

Every rank knows what every other one sends, so it can say from whom a wrong value came. Intervals are of unequal
length, that of rank 0 empty; every wire is used.
"""

from __future__ import annotations

from itertools import accumulate
from typing import get_args

import numpy as np

from mlx_empire.comm.accumulate import WIRE_DTYPES
from mlx_empire.comm.protocol import Array, Communicator, Wire
from mlx_empire.errors import NumericsError, on_all_ranks

ELEMENTS = 192  # of rank 1's interval; rank r has r times as many


def self_test(comm: Communicator) -> None:
    """NumericsError on all ranks, naming who received wrong values from whom. Collective; traffic is a few KB."""
    edges = [0, *accumulate(ELEMENTS * (rank or comm.size == 1) for rank in range(comm.size))]
    wrong: list[str] = []
    for wire in get_args(Wire):
        wrong += _wrong_gather(comm, edges, wire)
        wrong += _wrong_reduction(comm, edges, wire)
    reports = comm.gather_json(wrong)
    if any(reports):
        places = [f"rank {rank} on {host}" for rank, host in enumerate(comm.hostnames)]
        said = [f"{places[rank]}: {', '.join(report)}" for rank, report in enumerate(reports) if report]
        raise on_all_ranks(
            NumericsError(
                f"the self-test of the collectives failed: {'; '.join(said)}; look at the network, the memory and the "
                "MPI installation of these machines"
            )
        )


def _wrong_gather(comm: Communicator, edges: list[int], wire: Wire) -> list[str]:
    """Which ranks' intervals came wrong."""
    whole = _values(edges[-1], 0, wire)
    buffer = np.zeros_like(whole)
    own = slice(edges[comm.rank], edges[comm.rank + 1])
    buffer[own] = whole[own]
    comm.all_gather(buffer, edges)
    return [
        f"all-gather of {wire} from rank {rank}"
        for rank in range(comm.size)
        if buffer[edges[rank] : edges[rank + 1]].tobytes() != whole[edges[rank] : edges[rank + 1]].tobytes()
    ]


def _wrong_reduction(comm: Communicator, edges: list[int], wire: Wire) -> list[str]:
    """Which ranks' contributions came wrong, each reduced alone; and whether the sum of all of them is right."""
    ranks = range(comm.size)
    wrong = [f"reduce-scatter of {wire} from rank {r}" for r in ranks if not _sums(comm, edges, wire, [r])]
    together = _sums(comm, edges, wire, list(ranks))  # in any case: ranks must not part ways here
    return wrong if wrong or together else [f"reduce-scatter of {wire} from all ranks together"]


def _sums(comm: Communicator, edges: list[int], wire: Wire, sources: list[int]) -> bool:
    """Whether this rank's interval of the sum over `sources` is right."""
    a, b = edges[comm.rank], edges[comm.rank + 1]
    total = np.zeros(b - a, np.float32)
    pieces = [(0, _values(edges[-1], comm.rank, wire))] if comm.rank in sources else []
    comm.reduce_scatter(pieces, edges, total, [rank in sources for rank in range(comm.size)], wire)
    return bool(np.array_equal(total, sum(_exact(edges[-1], rank)[a:b] for rank in sources)))


def _exact(length: int, rank: int) -> Array:
    """Small whole numbers, which every wire carries exactly: they differ from place to place and rank to rank."""
    return ((np.arange(length) * 7 + rank * 13) % 61 + 1).astype(np.float32)


def _values(length: int, rank: int, wire: Wire) -> Array:
    """`_exact` in the wire's dtype."""
    exact = _exact(length, rank)
    if wire == "bfloat16":
        return (exact.view(np.uint32) >> 16).astype(np.uint16)
    return exact.astype(WIRE_DTYPES[wire])
