"""What is known of chips, and which one a node has: the figures of `chips.toml`, read once.

Decides what stands in for a figure that the file leaves out: speed by GPU cores from the M3 Ultra's, or by the vendor's
peak from the H100's share of its own; memory at a quarter to all of the vendor's rate. Of a chip that is neither in
the file nor measured nothing is known (None), and nothing is computed from it: `no_time` is the sentence that says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_empire.cluster.hostfile import Node
from mlx_empire.sizes import GIB

if TYPE_CHECKING:
    from mlx_empire.cluster.machine import Calibration

Range = tuple[float, float]
TERA, GIGA = 1e12, 1e9
FILE = Path(__file__).with_name("chips.toml")
SCALED_FROM, RENTED = "M3 Ultra", "H100"
_DISK: Range = (3 * GIGA, 6 * GIGA)  # planned: no figure for the internal SSDs was measured here
# Words that a driver or a vendor writes beside a chip's name.
_BESIDE = re.compile(r"apple|nvidia|geforce|tesla|tensor|core|gpu|sxm\d?|pcie|hbm\d?e?|\d+gi?b")


@dataclass(frozen=True)
class Chip:
    """What one chip does in training, and what it costs.

    `tflops`: executed TFLOP/s, recomputation counted. `memory_rate`: bytes per second at
    which weights are read and the optimizer works. `disk_rate`: bytes per second of long reads and writes. `watts`:
    under load, None where nobody knows. `memory`: GB that it is sold with; `prices`: (GB, dollars); `rent`: dollars an
    hour, None where it is not rented out. `mark`: measured (by us), reported (by others) or planned (an estimate).
    """

    name: str
    tflops: Range
    memory_rate: Range
    disk_rate: Range
    watts: float | None
    mark: str
    source: str
    memory: tuple[int, ...] = ()
    prices: tuple[tuple[int, int], ...] = ()
    rent: Range | None = None

    def price(self, memory_bytes: int) -> int | None:
        """Dollars, new, with so much memory; None where no price is known."""
        return next((p for size, p in self.prices if memory_bytes in (size * GIB, size * 10**9)), None)


@cache
def chips() -> Mapping[str, Chip]:
    """Every chip of the file by its plain name, in the file's order."""
    import tomllib  # a run that asks for no chip does not load it

    with FILE.open("rb") as file:
        rows: list[dict[str, Any]] = tomllib.load(file)["chip"]
    by_name = {row["name"]: row for row in rows}
    ultra, h100 = by_name[SCALED_FROM], by_name[RENTED]

    def speed(row: Mapping[str, Any]) -> Range:
        if "tflops" in row:
            low, high = row["tflops"]
        elif "peak" in row:
            low, high = (one * row["peak"] / h100["peak"] for one in h100["tflops"])
        else:
            low, high = (one * row["cores"] / ultra["cores"] for one in ultra["tflops"])
        return low, high

    return {plain_name(row["name"]): _chip(row, speed(row)) for row in rows}


def _chip(row: Mapping[str, Any], tflops: Range) -> Chip:
    bandwidth = row["bandwidth"]
    low, high = bandwidth if isinstance(bandwidth, list) else (bandwidth / 4, bandwidth)
    disk = row.get("disk")
    rent = row.get("rent")
    return Chip(
        name=row["name"],
        tflops=tflops,
        memory_rate=(low * GIGA, high * GIGA),
        disk_rate=(disk[0] * GIGA, disk[1] * GIGA) if disk else _DISK,
        watts=float(row["watts"]),
        mark=row["mark"],
        source=row["source"],
        memory=tuple(row.get("memory", ())),
        prices=tuple((int(size), dollars) for size, dollars in row.get("price", {}).items()),
        rent=(rent[0], rent[1]) if rent else None,
    )


def chip_named(name: str) -> Chip:
    """The chip of the file with this name, which is known to be there."""
    return chips()[plain_name(name)]


def chip_of(node: Node, calibration: Calibration | None = None) -> Chip | None:
    """The chip that a node has, with what a calibration measured on such a one; None where it is not known.

    A node names it (`chip=M3-Ultra`, "Apple M3 Ultra"); of those that name none a Mac of the empire has an M3 Ultra,
    and a machine that was asked itself computes on its CPU.
    """
    name = _name_of(node)
    known = chips().get(plain_name(name)) if name else None
    if calibration is None or name is None or plain_name(calibration.chip or "CPU") != plain_name(name):
        return known
    speed, rate = calibration.tflops, calibration.memory_rate
    new = known or Chip(name, (0, 0), (0, 0), _DISK, None, "", "")
    return replace(
        new,
        tflops=(0.9 * speed, 1.1 * speed),
        memory_rate=(0.9 * rate, 1.1 * rate),
        mark="measured",
        source=f"calibration on {calibration.machine}",
    )


def _name_of(node: Node) -> str | None:
    if node.chip is not None:
        return node.chip
    if node.role or node.memory_bytes in (512 * GIB, 256 * GIB):
        return SCALED_FROM
    return "CPU" if node.measured else None


def no_time(nodes: Sequence[Node], calibration: Calibration | None = None) -> str | None:
    """One sentence why nothing is said of time on `nodes`, and the remedy; None where every chip is known."""
    node = next((node for node in nodes if chip_of(node, calibration) is None), None)
    if node is None:
        return None
    home = f"{FILE.parent.name}/{FILE.name} of mlx_empire"
    measure = f"or measure it with --calibrate on {node.name}"
    if node.chip is None:
        return f"no time: no chip is named for {node.name}: write chip=M4-Max or another into the hostfile, {measure}"
    return f"no time: unknown chip {node.chip} of {node.name}: add it to {home}, {measure}"


def known_speed(nodes: Sequence[Node]) -> float | None:
    """Executed FLOP/s that the chips of all nodes may reach together; None where one is not named or not known."""
    found = [chip_of(node) if node.chip is not None else None for node in nodes]
    if any(chip is None for chip in found):
        return None
    return sum(chip.tflops[1] * TERA for chip in found if chip is not None)


def price_of(node: Node) -> int | None:
    """Dollars of a machine like this node, None where no price is known."""
    chip = chip_of(node)
    return None if chip is None else chip.price(node.memory_bytes)


def is_mac(node: Node) -> bool:
    """Whether a node is a Mac, also one with a chip of which nothing is known."""
    return (
        re.match(r"apple|m[1-9](?!\d)", (_name_of(node) or "").lower()) is not None
    )  # M40 and M60 are NVIDIA's


def on_cpu(node: Node) -> bool:
    """Whether a node that only a hostfile describes is planned as computing on its CPU: where it names that or
    nothing, and is no Mac."""
    return plain_name(node.chip or "CPU") == "cpu" and not is_mac(node)


def plain_name(name: str) -> str:
    """A chip's name without what is written around it, for comparing: `NVIDIA A100-SXM4-80GB` is a100."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "".join(word for word in words if not _BESIDE.fullmatch(word)).removeprefix("apple")
