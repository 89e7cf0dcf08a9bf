"""How long a step and a run take, and what holds them back: ranges over what the chips may execute.

A step is played on lanes (`step_time`), once with the best and once with the worst of what chips and wire may do. What
is said of its parts is how long the busiest rank's lane is at work, whatever it overlaps with. `disk` is writing and
reading layers' inputs, and loading the weights once and writing the result once, spread over the steps. Evaluation,
saves in between and the first compilation are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from mlx_empire.cluster.hostfile import Node
from mlx_empire.cluster.machine import Calibration
from mlx_empire.errors import UserError
from mlx_empire.plan.assess import Assessment
from mlx_empire.plan.chips import (
    GIGA,
    RENTED,
    TERA,
    Chip,
    Range,
    chip_named,
    chip_of,
    is_mac,
    no_time,
    price_of,
)
from mlx_empire.plan.hardware import (
    ADDING_RATE,
    DOLLARS_PER_KWH,
    USABLE_OF_RENTED,
    WIRES,
    Wire,
    hourly_wear,
)
from mlx_empire.plan.lengths import DataSize, Every, Lengths
from mlx_empire.plan.step_time import ADD, COMPUTE, DISK, Link, Timeline, step_timeline
from mlx_empire.plan.work import ChipCosts, route_over, step_flops, trained_bytes, whole_weights

RENTED_AT_ONCE = (1, 2, 4, 8)  # how many H100 one machine has; more come in eights


@dataclass(frozen=True)
class Pace:
    """Times as (low, high). `parts`: seconds of a step by name, `bound` the largest of them:
    compute, network, adding (contributions to totals, in line with the network), optimizer or disk.

    `positions_per_second`: input positions of whole rows of data.sequence_length, whatever of them are targets.
    `energy_kwh`: None where nobody knows what a chip draws. `lengths`: of the run, on data of the size that was given
    or assumed. `timeline`: the step with the best that chips and wire may do.
    """

    step_seconds: Range
    positions_per_second: Range
    run_hours: Range
    energy_kwh: Range | None
    bound: str
    parts: Mapping[str, Range]
    wire: Wire
    lengths: Lengths
    timeline: Timeline

    @property
    def first_evaluation(self) -> Range | None:
        """Hours until the first evaluation after a step; None where there is none."""
        return self._hours(self.lengths.evaluate)

    @property
    def first_checkpoint(self) -> Range | None:
        """Hours until the first checkpoint is begun; None where there is none."""
        return self._hours(self.lengths.save)

    @property
    def lost(self) -> Range:
        """Hours of work that the worst crash costs: what is done between two checkpoints, and while the second one is
        written, beside the next step."""
        between = self._hours(self.lengths.save)
        if between is None:
            return self.run_hours
        low, high = (
            min(hours + step / 3600, run)
            for hours, step, run in zip(between, self.step_seconds, self.run_hours, strict=True)
        )
        return low, high

    def _hours(self, every: Every) -> Range | None:
        """Between two times at which it is done. Wall time is looked at when a step ends, so steps are whole."""
        if not every:
            return None
        low, high = (
            seconds
            * min(every.steps or max(math.ceil(every.seconds / seconds), 1), self.lengths.steps)
            / 3600
            for seconds in self.step_seconds
        )
        return min(low, high), max(low, high)


@dataclass(frozen=True)
class Cloud:
    """The same run on rented H100s: how many, how long, and what it costs; `sentence` says it with both sides."""

    gpus: int
    hours: Range
    dollars: Range
    sentence: str


def pace_of(
    assessment: Assessment,
    wire: Wire,
    chips: Sequence[Chip] | None = None,
    calibration: Calibration | None = None,
    size: DataSize | None = None,
) -> Pace:
    """Time of a plan over `wire`. `chips`: one per node, default what the nodes are; `size`: of the training data,
    default what is assumed of it. UserError where a chip is not known."""
    used = chips_of(assessment, chips, calibration)
    slow, fast = (_played(assessment, wire, used, i) for i in (0, 1))
    recipe = assessment.recipe
    lengths = Lengths.of(recipe, size or DataSize.assumed(recipe))
    steps = lengths.steps
    load = _slowest(_over(2 * whole_weights(assessment), chip.disk_rate) for chip in used)
    disk = (load[0] / steps, load[1] / steps)
    low, high = fast.timeline.seconds + disk[0], slow.timeline.seconds + disk[1]
    parts = {name: (fast.parts[name], slow.parts[name]) for name in fast.parts}
    parts["disk"] = parts["disk"][0] + disk[0], parts["disk"][1] + disk[1]
    positions = recipe.batch.global_size * recipe.data.sequence_length
    hours = (low * steps / 3600, high * steps / 3600)
    watts = [chip.watts for chip in used if chip.watts is not None]
    kilowatts = sum(watts) / 1000 if len(watts) == len(used) else None
    return Pace(
        (low, high),
        (positions / high, positions / low),
        hours,
        None if kilowatts is None else (kilowatts * hours[0], kilowatts * hours[1]),
        max(parts, key=lambda name: sum(parts[name])),
        parts,
        wire,
        lengths,
        fast.timeline,
    )


def paces(
    assessment: Assessment,
    chips: Sequence[Chip] | None = None,
    calibration: Calibration | None = None,
    size: DataSize | None = None,
) -> dict[str, Pace]:
    """The pace over every wire, by the wire's key."""
    return {wire.key: pace_of(assessment, wire, chips, calibration, size) for wire in WIRES}


def chips_of(
    assessment: Assessment, chips: Sequence[Chip] | None = None, calibration: Calibration | None = None
) -> list[Chip]:
    """The chip of each node, calibrated where a calibration is of that chip. UserError where one is not known."""
    if chips is not None:
        assert len(chips) == len(assessment.nodes), "one chip per node"
        return list(chips)
    nodes = [n.node for n in assessment.nodes]
    if why := no_time(nodes, calibration):
        raise UserError(why)
    return [chip for node in nodes if (chip := chip_of(node, calibration)) is not None]


def ends(pace: Pace, start: datetime) -> tuple[datetime, datetime]:
    """The earliest and the latest end of a run that begins at `start`; at most a hundred years later."""
    longest = 100 * 365.25 * 24
    early, late = (start + timedelta(hours=min(h, longest)) for h in pace.run_hours)
    return early, late


def cloud_of(assessment: Assessment, lengths: Lengths, pace: Pace | None) -> Cloud:
    """The same steps on the fewest H100s that hold weights, gradients and states; network and waiting not counted.

    `pace`: of these machines, to compare with; None where nothing is known of their time.
    """
    spec, plan, h100 = assessment.spec, assessment.plan, chip_named(RENTED)
    assert h100.rent is not None, "chips.toml says what one costs"
    ranks = range(len(assessment.nodes))
    flops = lengths.steps * sum(step_flops(spec, plan.shards, plan.work, r) for r in ranks)
    need = sum(trained_bytes(assessment).values())
    least = -(-need // int(USABLE_OF_RENTED * h100.memory[0] * GIGA))
    gpus = next((n for n in RENTED_AT_ONCE if n >= least), -(-least // 8) * 8)
    low, high = h100.tflops
    hours = (flops / (gpus * high * TERA) / 3600, flops / (gpus * low * TERA) / 3600)
    dollars = (gpus * hours[0] * h100.rent[0], gpus * hours[1] * h100.rent[1])
    return Cloud(gpus, hours, dollars, _comparison(assessment, pace, gpus, hours, dollars))


def power_dollars(pace: Pace) -> Range | None:
    """What the run's power costs; None where nobody knows what a chip draws."""
    if pace.energy_kwh is None:
        return None
    return pace.energy_kwh[0] * DOLLARS_PER_KWH[0], pace.energy_kwh[1] * DOLLARS_PER_KWH[1]


def run_dollars(nodes: Sequence[Node], pace: Pace) -> Range | None:
    """What a run on one's own machines costs: power, and what its hours take off their prices; None where a price or
    what a chip draws is not known."""
    prices, power = [price_of(node) for node in nodes], power_dollars(pace)
    if power is None or any(price is None for price in prices):
        return None
    wear = hourly_wear(sum(price for price in prices if price is not None))
    low, high = (hours * wear + cost for hours, cost in zip(pace.run_hours, power, strict=True))
    return low, high


def _comparison(assessment: Assessment, pace: Pace | None, gpus: int, hours: Range, dollars: Range) -> str:
    rented = f"{gpus} x {RENTED} would take {spell(hours)} hours at best and {spell(dollars)} dollars"
    if pace is None:
        return f"{rented}. How long these machines take is not known."
    own = f"these machines take {spell(pace.run_hours)} hours"
    nodes = [n.node for n in assessment.nodes]
    power, prices = power_dollars(pace), [price_of(node) for node in nodes]
    if power is None or any(p is None for p in prices) or not all(map(is_mac, nodes)):
        return f"{rented}; {own}. Time is what the cloud sells; data that may not leave the house cannot be rented out."
    cost = sum(p for p in prices if p is not None)
    per_gb = cost / (sum(n.limit_bytes for n in assessment.nodes) / 1e9)
    return (
        f"{rented}; {own} and {spell(power)} dollars of power, and cost {cost:,} dollars once. The Macs win on memory "
        f"({per_gb:.0f} dollars per GB that stays yours) and privacy, never on time: one H100 does the arithmetic of "
        "about 32 of them."
    )


def spell(pair: Range) -> str:
    """A range in words, with as many digits as it deserves: `3.1 to 7.4`, `120 to 290`."""
    low, high = (f"{x:,.0f}" if x >= 10 else f"{x:.1f}" if x >= 0.1 else f"{x:.2g}" for x in pair)
    return low if low == high else f"{low} to {high}"


@dataclass(frozen=True)
class _Played:
    """A step, and seconds of the busiest rank's lanes by name."""

    timeline: Timeline
    parts: Mapping[str, float]


def timeline_of(assessment: Assessment, wire: Wire, chips: Sequence[Chip], i: int) -> Timeline:
    """The step with the low (0) or high (1) end of what chips and wire may do."""
    plan = assessment.plan
    costs = [
        ChipCosts(
            assessment,
            r,
            chip.tflops[i] * TERA,
            chip.memory_rate[i],
            ADDING_RATE[i],
            chip.disk_rate[i],
        )
        for r, chip in enumerate(chips)
    ]
    link = Link(wire.rate[i], wire.per)
    return step_timeline(plan.shards, plan.work, costs, link, route_over(wire, plan.work.route))


def _played(assessment: Assessment, wire: Wire, chips: Sequence[Chip], i: int) -> _Played:
    timeline = timeline_of(assessment, wire, chips, i)
    ranks = range(len(chips))
    updates = [
        sum(e.end - e.start for e in timeline.events if e.rank == r and e.what == "update") for r in ranks
    ]
    return _Played(
        timeline,
        {
            "compute": max(timeline.busy(r, COMPUTE) - updates[r] for r in ranks),
            "network": timeline.wire_seconds,
            "adding": max(timeline.busy(r, ADD) for r in ranks),
            "optimizer": max(updates),
            "disk": max(timeline.busy(r, DISK) for r in ranks),
        },
    )


def _over(amount: float, rate: Range) -> Range:
    return amount / rate[1], amount / rate[0]


def _slowest(ranges: Iterable[Range]) -> Range:
    found = list(ranges)
    return max(r[0] for r in found), max(r[1] for r in found)
