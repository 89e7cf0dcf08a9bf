"""Whether a generation replaces the one from which it began: a function of its own metrics.jsonl and the recipe.

Before its first step a generation is the one it began from, so its evaluation at step 0 is that one's on the very rows
and sets on which its last evaluation is made. With a gate, each of its scores must meet its bound or be no worse than
before; without one, no score of the sets may be worse; without sets, the held-out loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_empire.daughters.generations import Decision
from mlx_empire.recipe.evaluation import HELD_OUT_LOSS, EvaluationSection, Gate, worse_by

Pair = tuple[float | None, float | None]


def judge(
    evaluation: EvaluationSection, records: Sequence[Mapping[str, Any]], number: int, begun_from: int
) -> Decision:
    """What becomes of generation `number`; `records`: its metrics, one evaluation at least at step 0."""
    evaluations = [record for record in records if HELD_OUT_LOSS in record]
    first = next((record for record in evaluations if record["step"] == 0), None)
    last = evaluations[-1] if evaluations else None
    scores = {} if first is None or last is None else _pairs(evaluation, first, last)
    compared = _compared(evaluation)
    bad = [name for name, gate in compared if not _good(gate, name, *scores.get(name, (None, None)))]
    told = dict.fromkeys(bad or [name for name, _ in compared])  # two parts may ask for one score
    said = "; ".join(_told(name, scores.get(name)) for name in told)
    return Decision(number, begun_from, not bad, said, scores)


def _compared(evaluation: EvaluationSection) -> list[tuple[str, Gate | None]]:
    """The scores that are looked at, each with its part of the gate, if there is one."""
    if evaluation.stop_when is not None:
        return [(part.metric, part) for part in evaluation.stop_when.parts]
    return [(name, None) for name in evaluation.scores or (HELD_OUT_LOSS,)]


def _good(gate: Gate | None, name: str, before: float | None, after: float | None) -> bool:
    """Whether a score meets the bound of the gate, if there is one, or was measured both times and is no worse."""
    if after is None:
        return False
    if gate is not None and gate.passes(after):
        return True
    if before is None:
        return False
    return worse_by(name, before, after) <= 0


def _pairs(
    evaluation: EvaluationSection, first: Mapping[str, Any], last: Mapping[str, Any]
) -> dict[str, Pair]:
    pairs: dict[str, Pair] = {HELD_OUT_LOSS: (first[HELD_OUT_LOSS], last[HELD_OUT_LOSS])}
    for name in evaluation.scores:
        pairs[name] = (first.get("scores", {}).get(name), last.get("scores", {}).get(name))
    return pairs


def _told(name: str, pair: Pair | None) -> str:
    before, after = ("-" if value is None else f"{value:.4f}" for value in pair or (None, None))
    return f"{name} {before} -> {after}"
