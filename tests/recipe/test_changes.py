"""Which differences between recipes a continued run may have."""

from __future__ import annotations

import pytest
from support.king import recipe

from mlx_empire.errors import UserError
from mlx_empire.recipe.changes import changes, require_acceptable
from mlx_empire.recipe.schema import Recipe


def judged(before: Recipe, now: Recipe, *accepted: str) -> list[str]:
    return require_acceptable(before, now, accepted, "checkpoint c")


def test_equal_recipes_have_no_changes() -> None:
    assert changes(recipe(), recipe()) == {}
    assert judged(recipe(), recipe()) == []


@pytest.mark.parametrize(
    "override",
    [
        "run.dir=q",
        "run.save_every=3",
        "run.keep_last=2",
        "run.eval_every=5",
        "run.hosts=h",
        "run.resume=7",
        "run.buddy=false",
        "run.checkpoints=c",
        "run.accept_changes=[run.seed]",
        "memory.zero_stage=3",
        "memory.shares=[2,1]",
        "memory.gradient_checkpointing=true",
        "comm.bucket_bytes=8192",
        "report.tensorboard=true",
        "run.steps=20",
    ],
)
def test_harmless_changes_are_shown_and_pass(override: str) -> None:
    (line,) = judged(recipe(), recipe(override))
    assert line.startswith(override.split("=")[0] + ": ")
    assert " -> " in line


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=1",
        "model.path=n",
        "data.path=e",
        "data.sequence_length=16",
        "batch.global_size=8",
        "batch.cells=2",
        "optimizer.learning_rate=2e-3",
        "optimizer.state_bits=8",
        "memory.gradient_dtype=bfloat16",
        "tuning.type=lora",
        "run.eval_batches=3",
        "numerics.spikes=skip",
    ],
)
def test_other_changes_are_refused_unless_they_are_named(override: str) -> None:
    key = override.split("=")[0]
    with pytest.raises(
        UserError, match=rf"checkpoint c was made by another recipe: {key}: .* -> .*\[{key}\]"
    ):
        judged(recipe(), recipe(override))
    assert len(judged(recipe(), recipe(override), key)) == 1


def test_the_length_is_harmless_only_where_nothing_is_measured_in_it() -> None:
    assert judged(recipe("schedule.warmup=2"), recipe("schedule.warmup=2", "run.steps=20"))
    for schedule in (["schedule.type=cosine"], ["schedule.warmup=10%"]):
        with pytest.raises(UserError, match=r"run\.steps: 10 -> 20"):
            judged(recipe(*schedule), recipe(*schedule, "run.steps=20"))


def test_all_refused_keys_are_named_at_once() -> None:
    with pytest.raises(UserError, match=r"accept_changes=\[optimizer.eps,run.seed\]"):
        judged(recipe(), recipe("run.seed=2", "optimizer.eps=1e-7", "report.tensorboard=true"))
