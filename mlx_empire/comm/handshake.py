"""Whether all ranks are about to do the same thing: what must be equal on all of them is compared first of all.

Decides what counts as the same environment, and how a difference is shown: a table of what differs, by rank.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata

import mlx.core as mx

from mlx_empire import __version__
from mlx_empire.comm.connect import under_mpirun
from mlx_empire.comm.protocol import Communicator
from mlx_empire.errors import UserError, on_all_ranks

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
    return facts


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
