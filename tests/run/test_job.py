"""A job against steps, rates and rows that are counted here by hand."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from math import ceil, cos, floor, pi

import pytest
from data.test_batches import make_dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_empire.engine.trainer import StepResult
from mlx_empire.errors import UserError
from mlx_empire.plan.lengths import Every
from mlx_empire.plan.workload import cell_layout
from mlx_empire.recipe.idle import refuse_unmeasured
from mlx_empire.recipe.load import parse_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.run.job import Job

TEXT = """\
model: {path: m}
data: {path: d, sequence_length: 64}
batch: {global_size: 4}
optimizer: {learning_rate: 1.0}
run: {dir: r, steps: 10}
"""
LENGTHS = [10, 4, 7, 13, 22, 5, 31, 9, 16, 3]  # of ten rows
COUNTED = [
    sum(i % 3 != 2 for i in range(1, n)) for n in LENGTHS
]  # the first token is no target, nor every third


def recipe(*overrides: str) -> Recipe:
    return parse_recipe(TEXT, "x.yaml", overrides)


def job(*overrides: str) -> Job:
    return Job.of(recipe(*overrides), make_dataset(LENGTHS, 64, False))


def test_a_record_tells_how_often_the_rows_have_been_read() -> None:
    taken = StepResult(loss=1.0, gradient_norm=1.0, wait_seconds=0.0)
    assert [job().record(step, taken, 1.0)["epoch"] for step in (1, 5)] == [0.4, 2.0]


@pytest.mark.parametrize("unit", ["steps", "tok", "ep", "%"])
@given(amount=st.integers(1, 300), steps=st.integers(1, 200), size=st.sampled_from([1, 2, 3, 5, 10, 20]))
@example(amount=33, steps=110, size=3)  # 110 steps to the row, and 111 in floating point: runs were begun so
@settings(max_examples=25)
def test_durations_are_steps_of_this_data(unit: str, amount: int, steps: int, size: int) -> None:
    """2.5 steps of 4 rows are an epoch of 10: never fewer steps than were asked for, and percent to the nearest."""
    tokens_per_step = max(round(sum(COUNTED) / (10 / size)), 1)
    amount = min(
        amount, {"%": 100, "steps": steps}.get(unit, amount)
    )  # a warm-up may not be longer than the run
    by_hand = {
        "steps": amount,
        "tok": ceil(Fraction(amount, tokens_per_step)),
        "ep": ceil(amount * Fraction(10 / size)),
        "%": max(floor(Fraction(amount * steps, 100) + Fraction(1, 2)), 1),
    }[unit]
    written = str(amount) if unit == "steps" else f"{amount}{unit}"
    sized = [f"batch.global_size={size}", "batch.micro_size=1"]
    found = job(*sized, f"run.steps={steps}", f"run.save_every={written}", f"schedule.warmup={written}")
    assert (found.steps, found.save_every, found.rates.warmup_steps) == (steps, Every(by_hand), by_hand)
    if unit != "%":
        assert job(*sized, f"run.steps={written}").steps == by_hand


def test_rates_are_those_of_the_schedule() -> None:
    found = job("run.steps=9", "schedule.type=cosine", "schedule.warmup=2", "schedule.final=0.2")
    by_hand = [0.5, 1.0, *(0.2 + 0.8 * (1 + cos(pi * k / 8)) / 2 for k in range(1, 8))]
    assert [found.rates(step) for step in range(1, 10)] == pytest.approx(by_hand)


@given(steps=st.integers(1, 40), every=st.integers(0, 50))
@settings(max_examples=60)
def test_it_stops_to_evaluate_and_to_save_now_and_then_and_at_the_end(steps: int, every: int) -> None:
    often = [f"run.eval_every={every}", f"run.save_every={every}"] if every else []
    found = job(f"run.steps={steps}", *often)
    marks = {*range(every, steps + 1, every), steps} if every else set()
    assert [s for s in range(steps + 1) if found.ends(s)] == [steps]
    assert {s for s in range(1, steps + 1) if found.evaluates(s)} == marks
    assert {s for s in range(1, steps + 1) if found.saves(s, last=s == steps)} == marks
    assert found.evaluates(0) == (every > 0), "what there is to begin with is evaluated too"
    assert found.saves(1, last=True) == (every > 0), "a gate may end a run at any step"


@given(
    cells=st.integers(1, 4),
    world=st.integers(1, 3),
    micro=st.sampled_from([1, 2]),
    packing=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40)
def test_the_ranks_share_out_every_row_once_an_epoch(
    cells: int, world: int, micro: int, packing: bool, seed: int
) -> None:
    data = make_dataset(LENGTHS, 64, packing)
    size = 8
    asked = [f"batch.global_size={size}", f"batch.micro_size={micro}", f"run.seed={seed}"]
    whole = Job.of(recipe(*asked), data)
    layout = cell_layout(size, micro, cells, world)
    ranks = [whole.part(layout.of_rank(rank)) for rank in range(world)]
    read: list[int] = []
    for step in range(1, len(data) + 1):
        by_rank = [rank.batches(step) for rank in ranks]
        batches = sorted(
            (j, batch)
            for rank, own in zip(ranks, by_rank, strict=True)
            for j, batch in zip(rank.indices, own, strict=True)
        )
        assert [j for j, _ in batches] == list(range(size // micro))
        assert sum(int(batch.mask.sum()) for _, batch in batches) == ranks[0].targets(step)
        assert sum(batch.inputs.size for _, batch in batches) == ranks[-1].positions(step)
        rows = [row for _, batch in batches for row in batch.rows_read]
        assert rows == [row for batch in whole.batches(step) for row in batch.rows_read]
        assert all(len(batch.rows_read) == micro for _, batch in batches)
        read += rows
    assert Counter(read) == dict.fromkeys(range(len(data)), size)  # so many steps are so many epochs


def test_what_could_never_happen_is_refused() -> None:
    data = make_dataset(LENGTHS, 64, False)
    gated = recipe("run.eval_every=2", "evaluation.stop_when={metric: eval_loss, at_most: 2}")
    assert Job.of(gated, data).gate == gated.evaluation.stop_when
    for asked, said in (
        (gated, r"evaluation\.stop_when: eval_loss: there is no validation data"),
        (recipe("run.eval_every=2"), r"run\.eval_every: 2: there is no validation data"),
        (
            recipe(
                "run.eval_every=2", "report.samples=2", "evaluation.sets=[{path: x.jsonl, metrics: [loss]}]"
            ),
            r"report\.samples: 2: there is no validation data",
        ),
    ):
        refuse_unmeasured(asked, held_out=True)
        with pytest.raises(UserError, match=said):
            refuse_unmeasured(asked, held_out=False)
