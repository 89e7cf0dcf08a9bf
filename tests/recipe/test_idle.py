"""Keys that have no effect with the others are named with value and reason; what was not asked for is not."""

from __future__ import annotations

import pytest

from mlx_empire.recipe.idle import without_effect
from mlx_empire.recipe.load import parse_recipe

BF16, F32 = frozenset({"bfloat16"}), frozenset({"float32"})
IDLE = [
    (
        "optimizer.master_weights=diet",
        F32,
        2,
        "optimizer.master_weights: diet (float32 weights are their own masters)",
    ),
    ("memory.zero_stage=2", BF16, 1, "memory.zero_stage: 2 (one machine"),
    ("memory.shares=equal", BF16, 1, "memory.shares: equal (one machine"),
    ("run.buddy=true", BF16, 1, "run.buddy: true (there is no other machine"),
    ("numerics.max_skips=3", BF16, 2, "numerics.max_skips: 3 (numerics.spikes is log"),
    ("numerics.loss_scale_window=9", BF16, 2, "numerics.loss_scale_window: 9 (no loss scale is dynamic"),
    ("data.validation_split=0.1", BF16, 2, "data.validation_split: 0.1 (run.eval_every is null"),
    ("report.samples=2", BF16, 2, "report.samples: 2 (run.eval_every is null"),
    ("run.eval_batches=4", BF16, 2, "run.eval_batches: 4 (run.eval_every is null"),
]
WITH_ANOTHER = [
    (["optimizer.name=lion", "optimizer.eps=1e-6"], "optimizer.eps: 1e-06 (lion"),
    (
        ["optimizer.name=sgd", "optimizer.betas=[0.9,0.5]"],
        "optimizer.betas: [0.9, 0.5] (sgd reads the first one only)",
    ),
    (["data.format=text", "data.mask_prompt=false"], "data.mask_prompt: false (rows of text have no prompt)"),
    (["numerics.spikes=off", "numerics.window=32"], "numerics.window: 32 (numerics.spikes is off)"),
    (
        ["report.progress=always", "report.log_every=1min"],
        "report.log_every: 1min (report.progress is always",
    ),
    (
        ["comm.deadline_seconds=10", "comm.deadline_floor_seconds=20"],
        "comm.deadline_floor_seconds: 20.0 (no deadline",
    ),
    (["model.init=random", "model.compare=contents"], "model.compare: contents (model.init is random"),
    (
        ["run.eval_every=5", "evaluation.sets=[{path: a.jsonl, metrics: [loss], pattern: x, max_tokens: 9}]"],
        "evaluation.sets: pattern of a (it serves regular_expression); evaluation.sets: max_tokens of a",
    ),
]


@pytest.mark.parametrize(("override", "dtypes", "ranks", "said"), IDLE)
def test_an_idle_key_is_told(
    minimal: str, override: str, dtypes: frozenset[str], ranks: int, said: str
) -> None:
    (line,) = without_effect(parse_recipe(minimal, "x", [override]), dtypes, ranks)
    assert line.startswith(f"without effect here: {said}")


@pytest.mark.parametrize(("override", "dtypes", "ranks"), [case[:3] for case in IDLE[:4]])
def test_the_same_key_is_not_told_where_it_works(
    minimal: str, override: str, dtypes: frozenset[str], ranks: int
) -> None:
    works = (BF16, 2)
    assert (dtypes, ranks) != works
    assert without_effect(parse_recipe(minimal, "x", [override]), *works) == []


@pytest.mark.parametrize(("overrides", "said"), WITH_ANOTHER)
def test_a_key_that_another_makes_idle_is_told_and_by_itself_is_not(
    minimal: str, overrides: list[str], said: str
) -> None:
    (line,) = without_effect(parse_recipe(minimal, "x", overrides), BF16, 2)
    assert line.startswith(f"without effect here: {said}")
    assert without_effect(parse_recipe(minimal, "x", overrides[:1]), BF16, 2) == []


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtypes", [BF16, F32])
def test_nothing_is_told_of_defaults(minimal: str, ranks: int, dtypes: frozenset[str]) -> None:
    assert without_effect(parse_recipe(minimal, "x"), dtypes, ranks) == []
