"""Wires, the machines of the empire and what power costs: what time and advice are computed from beside the chips.

Decides what is assumed where nothing was measured. Every figure carries a mark: `measured` (by us), `reported` (by
others for the real machine, not re-checked here), `planned` (no figure was found: an estimate to be replaced by a
calibration). Ranges are (low, high). The figures of chips, prices among them, are in `chips.toml`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_empire.cluster.hostfile import Node, default_limit
from mlx_empire.errors import UserError
from mlx_empire.plan.chips import GIGA, SCALED_FROM, Range, chip_named
from mlx_empire.sizes import GIB

# One thread adds contributions to fp32 totals, in bytes of contributions per second: planned for every chip, from
# 1.4 to 2.8 thousand million bfloat16 additions a second on a 2-core x86.
ADDING_RATE: Range = (2.8 * GIGA, 5.6 * GIGA)


@dataclass(frozen=True)
class Wire:
    """A network: `rate` in bytes per second and direction.

    `per`: "card" where all traffic of a node shares one connection, "pair" where each pair of nodes has its own
    cable. `built`: whether the trainer can use it today.
    """

    key: str
    name: str
    rate: Range
    per: str
    built: bool
    mark: str
    source: str


WIRES = (
    Wire("10gbe", "10 GbE", (1.1 * GIGA, 1.1 * GIGA), "card", True, "reported", "about 1.1 GB/s"),
    Wire(
        "thunderbolt",
        "TCP over Thunderbolt",
        (2 * GIGA, 4 * GIGA),
        "card",
        True,
        "planned",
        "no published figure found; 3 GB/s planned",
    ),
    Wire(
        "cable",
        "RDMA, one cable",
        (6.1 * GIGA, 6.5 * GIGA),
        "card",
        False,
        "reported",
        "Thunderbolt 5, one cable: 6.1-6.5 GB/s; needs the JACCL backend, which is not built yet",
    ),
    Wire(
        "mesh",
        "RDMA, full mesh",
        (6.1 * GIGA, 6.5 * GIGA),
        "pair",
        False,
        "reported",
        "Thunderbolt 5, a cable per pair; needs the JACCL backend, which is not built yet",
    ),
)


def wire_named(key: str) -> Wire:
    """The wire with this key. UserError for an unknown one."""
    for wire in WIRES:
        if wire.key == key:
            return wire
    raise UserError(f"wire {key}: unknown; known: {', '.join(w.key for w in WIRES)}")


def wire_of(nodes: Sequence[Node]) -> Wire:
    """The wire that a hostfile describes (its slowest `link=`), else 10 GbE."""
    links = [n.link_bytes_per_second for n in nodes if n.link_bytes_per_second]
    if not links:
        return WIRES[0]
    slowest = min(links)
    return Wire(
        "link", f"{slowest / GIGA:g} GB/s", (slowest, slowest), "card", True, "given", "hostfile, link="
    )


@dataclass(frozen=True)
class Machine:
    """A Mac Studio with an M3 Ultra, which can be bought."""

    role: str
    memory_bytes: int

    def node(self, name: str) -> Node:
        """This machine as a node of a cluster, with the GPU limit that plans assume."""
        limit = default_limit(self.memory_bytes)
        return Node(name, 1, self.role, self.memory_bytes, limit, None, SCALED_FROM, measured=False)

    @property
    def dollars(self) -> int:
        """What one costs."""
        price = chip_named(SCALED_FROM).price(self.memory_bytes)
        assert price is not None, f"{self.role}: chips.toml has no price for so much memory"
        return price


KING = Machine("king", 512 * GIB)
SOLDIER = Machine("soldier", 256 * GIB)

USABLE_OF_RENTED = 0.9  # planned: what a job may use of a rented card's memory
DOLLARS_PER_KWH: Range = (0.15, 0.40)  # planned: a household's
YEARS_OF_USE = 3  # planned: over which a machine's price is spread
HOURS_PER_YEAR = 8766


def hourly_wear(dollars: float) -> float:
    """What an hour of use takes off a machine's price."""
    return dollars / (YEARS_OF_USE * HOURS_PER_YEAR)


def standard_clusters() -> dict[str, tuple[Node, ...]]:
    """The four clusters of the matrix by name, kings first: 1K+3S, 2K+2S, 3K+1S, 4K."""
    clusters = {}
    for kings in (1, 2, 3, 4):
        soldiers = 4 - kings
        nodes = [KING.node(f"king-{i + 1}") for i in range(kings)]
        nodes += [SOLDIER.node(f"soldier-{i + 1}") for i in range(soldiers)]
        clusters[f"{kings}K" + (f"+{soldiers}S" if soldiers else "")] = tuple(nodes)
    return clusters
