"""What a plan that fits could do better: a faster setting, more positions a step, longer rows, larger micro-batches.

Nothing is proposed that would make the verdict worse: what fits with room keeps its room.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mlx_empire.capacity.whatif import (
    AS_IT_IS,
    Advice,
    Settings,
    as_good,
    fullest_node,
    with_least_memory,
    with_settings,
)
from mlx_empire.model.unread import learnt_positions
from mlx_empire.plan.assess import Assessment
from mlx_empire.plan.hardware import wire_named
from mlx_empire.plan.pace import Pace, spell
from mlx_empire.recipe.changes import typed, value

LONGEST_SEQUENCE = 1 << 20
SEQUENCE_STEP = 256
NOTICEABLE = 0.99  # a setting is faster when a step takes less than this of the present one
SLOW_WIRE = "10 GbE"

PaceOf = Callable[..., Pace]


def faster(assessment: Assessment, pace: PaceOf) -> list[Advice]:
    """The quickest stage and checkpointing; where the network holds things back, more work for each of its trips."""
    now = pace(assessment)
    found = [_fastest(assessment, now, pace)]
    if now.bound == "network":
        found += _more_per_step(assessment, now, pace)
        if now.wire.name == SLOW_WIRE:
            wire = wire_named("thunderbolt")
            then = pace(assessment, wire)
            effect = f"{spell(then.step_seconds)} s a step where it is {spell(now.step_seconds)} over {now.wire.name}"
            found.append(Advice("Thunderbolt cables, TCP over them", effect, assessment.verdict))
    return found


def _fastest(assessment: Assessment, now: Pace, pace: PaceOf) -> Advice:
    """The quickest of all stages with and without recomputation that still fits, gradients as they are."""
    kept = {"memory.gradient_dtype": assessment.plan.work.gradient_dtype}
    best, chosen, best_pace = assessment, Settings(), now

    def attempt(settings: Settings) -> None:
        nonlocal best, chosen, best_pace
        other = with_settings(assessment, {**kept, **settings})
        if as_good(other, assessment) and _middle(then := pace(other)) < NOTICEABLE * _middle(best_pace):
            best, chosen, best_pace = other, settings, then

    stages = (2, 1, 0, 3) if len(assessment.nodes) > 1 else (assessment.zero_stage,)
    recompute = (
        "auto" if assessment.plan.work.unrecomputed else True
    )  # with nothing to spare, a tail is worth one attempt
    for stage in stages:
        attempt({"memory.zero_stage": stage, "memory.gradient_checkpointing": recompute})
    if recompute is True and best_pace.bound == "compute":
        attempt({"memory.zero_stage": best.zero_stage, "memory.gradient_checkpointing": "auto"})
    before = spell(now.step_seconds)
    over = f" over {now.wire.name}" if len(assessment.nodes) > 1 else ""
    if not chosen:
        effect = f"no other stage or checkpointing is faster than {before} s a step{over}"
        return Advice(AS_IT_IS, effect, assessment.verdict)
    different = {k: v for k, v in chosen.items() if v != _present(assessment, k)}
    effect = f"{spell(best_pace.step_seconds)} s a step{over} where it is {before} now; {fullest_node(best)}"
    return Advice(typed(different or chosen), effect, best.verdict)


def _more_per_step(assessment: Assessment, now: Pace, pace: PaceOf) -> list[Advice]:
    """As many sequences a step as keep the machines computing while the network works, if they fit."""
    times = math.ceil(sum(now.parts["network"]) / max(sum(now.parts["compute"]), 1e-12))
    size = assessment.recipe.batch.global_size
    while times > 1:
        other = with_least_memory(assessment, {"batch.global_size": size * times})
        if as_good(other, assessment):
            then = pace(other)
            effect = (
                f"a gather serves {times} x as many positions: {spell(then.positions_per_second)} a second over "
                f"{now.wire.name} where it is {spell(now.positions_per_second)}; {fullest_node(other)}"
            )
            return [Advice(f"batch.global_size={size * times}", effect, other.verdict)]
        times //= 2
    return []


def _present(assessment: Assessment, name: str) -> Any:
    return assessment.zero_stage if name == "memory.zero_stage" else value(assessment.recipe, name)


def larger(assessment: Assessment) -> list[Advice]:
    """The longest sequence and the largest micro-batch that fit, everything else as asked."""
    found = []
    sequence = longest_sequence(assessment)
    if sequence is not None:
        length = sequence.recipe.data.sequence_length
        times = length / assessment.recipe.data.sequence_length
        effect = (
            f"the longest rows that fit, {times:.1f} x as many positions a step; {fullest_node(sequence)}"
        )
        found.append(Advice(f"data.sequence_length={length}", effect, sequence.verdict))
    micro = largest_micro(assessment)
    if micro is not None:
        effect = f"the most sequences that fit through a layer together; {fullest_node(micro)}"
        found.append(Advice(f"batch.micro_size={micro.recipe.batch.micro_size}", effect, micro.verdict))
    return found


def longest_sequence(assessment: Assessment) -> Assessment | None:
    """The assessment with the longest sequence that fits as well, found to 3 %; None where it is no longer than now.

    Whole multiples of 256, and never longer than the positions that the model was made for.
    """
    text = assessment.spec.text_config
    made_for = int(text.get("max_position_embeddings") or learnt_positions(text) or LONGEST_SEQUENCE)
    top = min(made_for, LONGEST_SEQUENCE) // SEQUENCE_STEP
    low = high = max(assessment.recipe.data.sequence_length // SEQUENCE_STEP, 1)
    best: Assessment | None = None

    def attempt(count: int) -> Assessment | None:
        other = with_least_memory(assessment, {"data.sequence_length": count * SEQUENCE_STEP})
        return other if as_good(other, assessment) else None

    while high < top:  # double while it fits ...
        high = min(2 * high, top)
        other = attempt(high)
        if other is None:
            break
        low, best = high, other
    else:
        return best
    while high - low > max(1, low // 32):  # ... then halve the gap
        middle = (low + high) // 2
        other = attempt(middle)
        if other is None:
            high = middle
        else:
            low, best = middle, other
    return best


def largest_micro(assessment: Assessment) -> Assessment | None:
    """The assessment with the largest micro-batch that fits as well and leaves each rank one, or None."""
    batch = assessment.recipe.batch
    busy = min(len(assessment.nodes), batch.global_size // batch.micro_size)
    cells = batch.cells if isinstance(batch.cells, int) else busy
    most = batch.global_size // max(cells, busy)
    sizes = [m for m in range(batch.micro_size + 1, most + 1) if batch.global_size % m == 0]
    best: Assessment | None = None
    for micro in sizes:
        other = with_least_memory(assessment, {"batch.micro_size": micro})
        if not as_good(other, assessment):
            break
        best = other
    return best


def _middle(pace: Pace) -> float:
    return sum(pace.step_seconds) / 2
