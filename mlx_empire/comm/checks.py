"""What is checked among the ranks before anything depends on it: the same environment, and collectives that are right.

What must be equal on all ranks is compared first of all; a difference is shown as a table of what differs, by rank.
Then the collectives are asked with a few kilobytes. Every rank knows what every other one sends, so it can say from
whom a wrong value came. Intervals are of unequal length, that of rank 0 empty; every wire is used.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import get_args

import mlx.core as mx
import numpy as np

from mlx_empire import __version__
from mlx_empire.comm.buffers import WIRE_DTYPES
from mlx_empire.comm.environment import under_mpirun
from mlx_empire.comm.protocol import Array, Communicator, Wire
from mlx_empire.comm.toolchain import toolchain
from mlx_empire.errors import NumericsError, UserError, on_all_ranks

PACKAGES = ("mlx", "mlx-lm", "mpi4py", "numpy")
LONGEST_CELL = 48

Facts = Mapping[str, str | None]  # None: this rank does not know, and takes part in no comparison


def environment() -> dict[str, str | None]:
    """What the program's results and messages depend on, on this machine."""
    facts: dict[str, str | None] = {
        "mlx_empire": __version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }
    facts |= {name: _version(name) for name in PACKAGES}
    if under_mpirun():
        from mpi4py import MPI

        facts["MPI"] = MPI.Get_library_version().split(",")[0].strip("\0 ")
    device = str(mx.default_device().type).rpartition(".")[2]
    facts["platform"] = f"{platform.system()} {platform.machine()}, {device}"
    return facts | toolchain()


def package_digest() -> str:
    """SHA-256 over the package's own files, so that two checkouts of one version are told apart."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*")):
        if file.suffix in (".py", ".json") and file.is_file():
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def shake_hands(comm: Communicator, facts: Facts, remedy: str) -> None:
    """UserError on all ranks, with a table, unless every fact is the same on all ranks that know it. Collective."""
    by_rank = [dict(one) for one in comm.gather_json(dict(facts))]
    names = list(dict.fromkeys(name for one in by_rank for name in one))
    odd = [name for name in names if len({one.get(name) for one in by_rank} - {None}) > 1]
    if odd:
        ranks = [f"rank {rank} on {host}" for rank, host in enumerate(comm.hostnames)]
        rows = [["", *ranks], *([name, *(_cell(one.get(name)) for one in by_rank)] for name in odd)]
        raise on_all_ranks(
            UserError("\n".join([f"ranks differ in {', '.join(odd)}; {remedy}", *_table(rows)]))
        )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed as a package"


def _cell(value: str | None) -> str:
    return "-" if value is None else value[:LONGEST_CELL]


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


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
