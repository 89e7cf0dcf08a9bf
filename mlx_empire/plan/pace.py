"""How long a step and a run take, and what holds them back: ranges over what the chips may execute.

Decides what overlaps. The network runs beside the computation, so forward and backward take as long as the slower
of the two; at stages 1 and 2 the gathers come with the update and overlap that, and at stage 1 the reductions wait
for the backward's end. Loading the weights once and writing the result once is spread over the steps as `disk`.
Evaluation, saves in between and the first compilation are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from mlx_empire.plan.assess import Assessment
from mlx_empire.plan.hardware import (
    DOLLARS_PER_KWH,
    H100_BYTES,
    H100_DOLLARS_PER_HOUR,
    H100_TFLOPS,
    H100_USABLE,
    TERA,
    WIRES,
    Calibration,
    Chip,
    Range,
    Wire,
    calibrated,
    chip_of,
    price_of,
)
from mlx_empire.plan.step_traffic import step_matrices
from mlx_empire.plan.work import (
    busiest,
    route_over,
    step_flops,
    trained_bytes,
    update_bytes,
    weight_bytes_read,
    whole_weights,
)
from mlx_empire.recipe.schema import Recipe

ASSUMED_STEPS = 1000  # where run.steps counts epochs of data that nobody has looked at
RENTED_AT_ONCE = (1, 2, 4, 8)  # how many H100 one machine has; more come in eights


@dataclass(frozen=True)
class Pace:
    """Times as (low, high). `parts`: seconds of a step by name. `bound`: compute, network, optimizer or disk.

    `steps_known`: False where the run is given in epochs and the data's size was not; hours are then of 1,000 steps.
    """

    step_seconds: Range
    tokens_per_second: Range
    run_hours: Range
    energy_kwh: Range
    bound: str
    parts: Mapping[str, Range]
    wire: str
    steps: int
    steps_known: bool


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
    rows: int | None = None,
) -> Pace:
    """Time of a plan over `wire`. `chips`: one per node, default what the nodes are; `rows` of the training data."""
    used = chips_of(assessment, chips, calibration)
    ranks = range(len(used))
    compute = _slowest(_compute(assessment, r, used[r]) for r in ranks)
    optimizer = _slowest(_over(update_bytes(assessment, r), used[r].memory_rate) for r in ranks)
    within, after = _network(assessment, wire)
    steps, known = run_steps(assessment.recipe, rows)
    load = _slowest(_over(2 * whole_weights(assessment), chip.disk_rate) for chip in used)
    disk = (load[0] / steps, load[1] / steps)
    low, high = (max(compute[i], within[i]) + max(optimizer[i], after[i]) + disk[i] for i in (0, 1))
    parts = {
        "compute": compute,
        "network": (within[0] + after[0], within[1] + after[1]),
        "optimizer": optimizer,
        "disk": disk,
    }
    recipe = assessment.recipe
    tokens = recipe.batch.global_size * recipe.data.sequence_length
    hours = (low * steps / 3600, high * steps / 3600)
    kilowatts = sum(chip.watts for chip in used) / 1000
    return Pace(
        (low, high),
        (tokens / high, tokens / low),
        hours,
        (kilowatts * hours[0], kilowatts * hours[1]),
        max(parts, key=lambda name: sum(parts[name])),
        parts,
        wire.name,
        steps,
        known,
    )


def paces(
    assessment: Assessment,
    chips: Sequence[Chip] | None = None,
    calibration: Calibration | None = None,
    rows: int | None = None,
) -> dict[str, Pace]:
    """The pace over every wire, by the wire's key."""
    return {wire.key: pace_of(assessment, wire, chips, calibration, rows) for wire in WIRES}


def chips_of(
    assessment: Assessment, chips: Sequence[Chip] | None = None, calibration: Calibration | None = None
) -> list[Chip]:
    """The chip of each node, calibrated where a calibration is of that chip."""
    found = [chip_of(n.node) for n in assessment.nodes] if chips is None else list(chips)
    assert len(found) == len(assessment.nodes), "one chip per node"
    return [calibrated(chip, calibration) for chip in found]


def run_steps(recipe: Recipe, rows: int | None) -> tuple[int, bool]:
    """(optimizer steps of the run, whether that is known)."""
    tokens = float(recipe.batch.global_size * recipe.data.sequence_length)
    if recipe.run.steps.unit == "epochs":
        if rows is None:
            return ASSUMED_STEPS, False
        return max(1, recipe.run.steps.to_steps(None, tokens, rows / recipe.batch.global_size)), True
    return max(1, recipe.run.steps.to_steps(None, tokens, 1.0)), True


def ends(pace: Pace, start: datetime) -> tuple[datetime, datetime]:
    """The earliest and the latest end of a run that begins at `start`; at most a hundred years later."""
    longest = 100 * 365.25 * 24
    early, late = (start + timedelta(hours=min(h, longest)) for h in pace.run_hours)
    return early, late


def cloud_of(assessment: Assessment, pace: Pace) -> Cloud:
    """The same steps on the fewest H100s that hold weights, gradients and states; network and waiting not counted."""
    flops = pace.steps * sum(step_flops(assessment, r) for r in range(len(assessment.nodes)))
    need = sum(trained_bytes(assessment).values())
    least = -(-need // int(H100_USABLE * H100_BYTES))
    gpus = next((n for n in RENTED_AT_ONCE if n >= least), -(-least // 8) * 8)
    hours = (flops / (gpus * H100_TFLOPS[1] * TERA) / 3600, flops / (gpus * H100_TFLOPS[0] * TERA) / 3600)
    dollars = (
        gpus * hours[0] * H100_DOLLARS_PER_HOUR[0],
        gpus * hours[1] * H100_DOLLARS_PER_HOUR[1],
    )
    return Cloud(gpus, hours, dollars, _comparison(assessment, pace, gpus, hours, dollars))


def _comparison(assessment: Assessment, pace: Pace, gpus: int, hours: Range, dollars: Range) -> str:
    rented = f"{gpus} x H100 would take {spell(hours)} hours at best and {spell(dollars)} dollars"
    own = f"these machines take {spell(pace.run_hours)} hours"
    power = (pace.energy_kwh[0] * DOLLARS_PER_KWH[0], pace.energy_kwh[1] * DOLLARS_PER_KWH[1])
    prices = [price_of(n.node) for n in assessment.nodes]
    if any(p is None for p in prices):
        return f"{rented}; {own}. Time is what the cloud sells; data that may not leave the house cannot be rented out."
    cost = sum(p for p in prices if p is not None)
    per_gb = cost / (sum(n.limit_bytes for n in assessment.nodes) / 1e9)
    return (
        f"{rented}; {own} and {spell(power)} dollars of power, and cost {cost:,} dollars once. The Macs win on memory "
        f"({per_gb:.0f} dollars per GB that stays yours) and privacy, never on time: one H100 does the arithmetic of "
        "about 32 of them."
    )


def spell(pair: Range) -> str:
    """A range in words, with as many digits as it deserves: `3.1-7.4`, `120-290`."""
    low, high = (f"{x:,.0f}" if x >= 10 else f"{x:.1f}" if x >= 0.1 else f"{x:.2g}" for x in pair)
    return low if low == high else f"{low}-{high}"


def _compute(assessment: Assessment, rank: int, chip: Chip) -> Range:
    """Seconds of arithmetic, or of reading the weights where there are too few tokens to keep the chip busy."""
    flops, read = step_flops(assessment, rank), weight_bytes_read(assessment, rank)
    fast = max(flops / (chip.tflops[1] * TERA), read / chip.memory_rate[1])
    slow = max(flops / (chip.tflops[0] * TERA), read / chip.memory_rate[0])
    return fast, slow


def _network(assessment: Assessment, wire: Wire) -> tuple[Range, Range]:
    """Seconds of traffic beside forward and backward, and beside the update."""
    plan = assessment.plan
    gathers, reductions = step_matrices(plan.shards, plan.work, route_over(wire, plan.work.route))
    whole = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(gathers, reductions, strict=True)]
    nothing: Range = (0.0, 0.0)
    stage = plan.shards.zero_stage
    if stage == 1:
        return nothing, _over(busiest(whole, wire), wire.rate)
    if stage == 2:
        return _over(busiest(reductions, wire), wire.rate), _over(busiest(gathers, wire), wire.rate)
    return _over(busiest(whole, wire), wire.rate), nothing


def _over(amount: float, rate: Range) -> Range:
    return amount / rate[1], amount / rate[0]


def _slowest(ranges: Iterable[Range]) -> Range:
    found = list(ranges)
    return max(r[0] for r in found), max(r[1] for r in found)
