"""Which generation is promoted by what scores, and words of the command that mean nothing together."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_empire.daughters.command import read
from mlx_empire.daughters.promote import judge
from mlx_empire.errors import UserError
from mlx_empire.recipe.evaluation import EvaluationSection

SETS = [{"path": "facts.jsonl", "metrics": ["exact_match", "loss"]}]
GATE = {"metric": "facts.exact_match", "at_least": 0.9}
BAND = {**GATE, "and": [{"metric": "facts.exact_match", "at_most": 0.97}]}  # of one score


def record(step: int, loss: float | None, match: float = 0.0, forced: float = 0.0) -> dict[str, Any]:
    return {"step": step, "eval_loss": loss, "scores": {"facts.exact_match": match, "facts.loss": forced}}


@pytest.mark.parametrize(
    ("sets", "gate", "before", "after", "promoted"),
    [
        ([], None, record(0, 2.0), record(9, 1.9), True),
        ([], None, record(0, 2.0), record(9, 2.0), True),
        ([], None, record(0, 2.0), record(9, 2.1), False),
        ([], None, record(0, 2.0), record(9, None), False),
        (SETS, None, record(0, 2.0, 0.5, 1.0), record(9, 9.0, 0.5, 0.9), True),
        (SETS, None, record(0, 2.0, 0.5, 1.0), record(9, 1.0, 0.4, 0.9), False),
        (SETS, None, record(0, 2.0, 0.5, 1.0), record(9, 1.0, 0.6, 1.1), False),
        (SETS, GATE, record(0, 2.0, 1.0, 1.0), record(9, 1.0, 0.95, 1.1), True),
        (SETS, GATE, record(0, 2.0, 1.0, 1.0), record(9, 1.0, 0.8, 0.1), False),
        (SETS, GATE, record(0, 2.0, 0.5, 1.0), record(9, 1.0, 0.8, 1.1), True),
        (SETS, GATE, record(0, 2.0, 0.5, 1.0), record(9, 1.0, 0.4, 0.1), False),
        (SETS, BAND, record(0, 2.0, 0.99, 1.0), record(9, 1.0, 0.95, 1.1), True),
        (SETS, BAND, record(0, 2.0, 0.99, 1.0), record(9, 1.0, 0.8, 0.1), False),
    ],
)
def test_what_is_promoted(
    sets: Any, gate: Any, before: dict[str, Any], after: dict[str, Any], promoted: bool
) -> None:
    section = EvaluationSection.model_validate({"sets": sets, "stop_when": gate})
    between = {**after, "step": 5, "eval_loss": 99.0}
    assert judge(section, [{"step": 1, "loss": 3.0}, before, between, after], 2, 1).promoted is promoted
    assert not judge(section, [after], 2, 1).promoted


@pytest.mark.parametrize(
    "words",
    [["--once"], ["--watch", "--pin", "alice"], ["--watch", "--every", "0"], ["--watch", "--every", "nan"]],
)
def test_words_that_mean_nothing_together_are_refused(words: list[str]) -> None:
    with pytest.raises(UserError, match=rf"^{words[-2:][0]}: |^--watch: "):
        read(["tiny.yaml", "--people", "people", *words])
