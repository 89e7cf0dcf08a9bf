"""Chips, wires and prices: the figures that time and advice are computed from, each with where it comes from.

Decides what is assumed where nothing was measured. Every figure carries a mark: `measured` (by us), `reported` (by
others for the real machine, not re-checked here), `planned` (no figure was found: an estimate to be replaced by a
calibration). Ranges are (low, high); prices are those of December 2025.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mlx_empire.cluster.hostfile import Node, default_limit
from mlx_empire.errors import UserError
from mlx_empire.sizes import GIB

if TYPE_CHECKING:
    from mlx_empire.cluster.machine import Calibration

Range = tuple[float, float]
TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Chip:
    """What one chip does in training.

    `tflops`: executed TFLOP/s, recomputation counted. `memory_rate`: bytes per second at which weights are read and
    the optimizer works. `disk_rate`: bytes per second of long reads and writes. `watts`: under load.
    """

    name: str
    tflops: Range
    memory_rate: Range
    disk_rate: Range
    watts: float
    mark: str
    source: str


_DISK: Range = (3 * GIGA, 6 * GIGA)  # planned: no figure for the internal SSDs was measured here


def _scaled(name: str, cores: int, bandwidth: float, watts: float) -> Chip:
    """A chip of which no training speed is known: the M3 Ultra's by the number of GPU cores."""
    speed = (5 * cores / 80, 12 * cores / 80)
    rate = (bandwidth / 4, bandwidth)
    return Chip(
        name, speed, rate, _DISK, watts, "planned", "the M3 Ultra's speed by GPU cores, Apple's bandwidth"
    )


M3_ULTRA = Chip(
    "M3 Ultra",
    (5.0, 12.0),
    (819 * GIGA / 4, 819 * GIGA),
    _DISK,
    270.0,
    "reported",
    "Apple's LoRA of a 9 B model at 180 tokens/s implies 5-10 TFLOP/s, an extrapolation from an M1 Max 10-14; 819 GB/s",
)
CPU = Chip(
    "CPU",
    (0.002, 0.12),
    (0.4 * GIGA, 10 * GIGA),
    (0.2 * GIGA, 2 * GIGA),
    65.0,
    "measured",
    "2-core x86, bfloat16 with the reference BLAS to float32 with OpenBLAS; disk and watts planned",
)
CHIPS = (
    M3_ULTRA,
    _scaled("M1 Max", 32, 400 * GIGA, 100),
    _scaled("M1 Ultra", 64, 800 * GIGA, 215),
    _scaled("M2 Max", 38, 400 * GIGA, 120),
    _scaled("M2 Ultra", 76, 800 * GIGA, 260),
    _scaled("M3 Max", 40, 400 * GIGA, 140),
    _scaled("M4 Max", 40, 546 * GIGA, 145),
    CPU,
)


def chip_of(node: Node) -> Chip:
    """The chip a node names (`chip=M3-Ultra`, "Apple M3 Ultra"), else M3 Ultra for a Mac of the empire, else a CPU."""
    if node.chip is not None:
        name = _plain(node.chip)
        for chip in CHIPS:
            if _plain(chip.name) in name:
                return chip
        if "apple" in name or re.match(r"m\d", name):
            return replace(M3_ULTRA, name=node.chip, tflops=(0.5, 12.0), mark="planned")
    return M3_ULTRA if node.role or node.memory_bytes in (512 * GIB, 256 * GIB) else CPU


def known_speed(nodes: Sequence[Node]) -> float | None:
    """Executed FLOP/s that the chips of all nodes may reach together; None where a chip is not named."""
    if any(node.chip is None for node in nodes):
        return None
    return sum(chip_of(node).tflops[1] * TERA for node in nodes)


def calibrated(chip: Chip, calibration: Calibration | None) -> Chip:
    """`chip` with what a calibration measured on it, each figure within 10 %; others stay as they are."""
    if calibration is None or _plain(calibration.chip or CPU.name) not in (
        _plain(chip.name),
        "apple" + _plain(chip.name),
    ):
        return chip
    speed, rate = calibration.tflops, calibration.memory_rate
    return replace(
        chip,
        tflops=(0.9 * speed, 1.1 * speed),
        memory_rate=(0.9 * rate, 1.1 * rate),
        mark="measured",
        source=f"calibration on {calibration.machine}",
    )


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
    """A machine that can be bought, in dollars."""

    role: str
    memory_bytes: int
    dollars: int

    def node(self, name: str) -> Node:
        """This machine as a node of a cluster, with the GPU limit that plans assume."""
        limit = default_limit(self.memory_bytes)
        return Node(name, 1, self.role, self.memory_bytes, limit, None, "M3 Ultra", measured=False)

    @property
    def dollars_per_gb(self) -> float:
        """Price per 10^9 bytes that the GPU may use by default."""
        return self.dollars / (default_limit(self.memory_bytes) / GIGA)


KING = Machine("king", 512 * GIB, 11_699)
SOLDIER = Machine("soldier", 256 * GIB, 8_099)
MACHINES = (SOLDIER, KING)

# One H100 does the arithmetic of about 32 M3 Ultras (10-14 TFLOP/s each); rented by the hour.
H100_TFLOPS: Range = (320.0, 448.0)
H100_BYTES = 80 * 10**9
H100_USABLE = 0.9  # planned: what a job may use of it
H100_DOLLARS_PER_HOUR: Range = (2.5, 4.0)
DOLLARS_PER_KWH: Range = (0.15, 0.40)  # planned: a household's
YEARS_OF_USE = 3  # planned: over which a machine's price is spread


def price_of(node: Node) -> int | None:
    """Dollars of the machine with this node's memory, None where no price is known."""
    return next((m.dollars for m in MACHINES if m.memory_bytes == node.memory_bytes), None)


def standard_clusters() -> dict[str, tuple[Node, ...]]:
    """The four clusters of the matrix by name, kings first: 1K+3S, 2K+2S, 3K+1S, 4K."""
    clusters = {}
    for kings in (1, 2, 3, 4):
        soldiers = 4 - kings
        nodes = [KING.node(f"king-{i + 1}") for i in range(kings)]
        nodes += [SOLDIER.node(f"soldier-{i + 1}") for i in range(soldiers)]
        clusters[f"{kings}K" + (f"+{soldiers}S" if soldiers else "")] = tuple(nodes)
    return clusters


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
