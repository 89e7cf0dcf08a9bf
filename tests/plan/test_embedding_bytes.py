"""What the ledger says of the embedding's gradients: the sums of all rounds are there before the first reduction."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.tiny_models import tiny_config

from mlx_empire.model.spec import ModelSpec, RootNames
from mlx_empire.model.target import make_target
from mlx_empire.optim.adamw import AdamW
from mlx_empire.plan.schedule import training_step
from mlx_empire.plan.shards import make_plan
from mlx_empire.plan.step_bytes import EMBEDDING, StepBytes
from mlx_empire.plan.workload import CellLayout, Workload
from mlx_empire.recipe.sections import TuningSection

TOKENS, VOCABULARY, HIDDEN = 16, 256, 64
ADAPTERS = {"type": "lora", "rank": 8, "targets": ["embed_tokens"]}


def spec_of(family: str, tuning: dict[str, object], dtype: str) -> ModelSpec:
    return make_target(tiny_config(family), TuningSection.model_validate(tuning), family, dtype).spec


def played(spec: ModelSpec, cells: int, *, tail: int = 0, folded: bool = True) -> StepBytes:
    """A step of one rank with two micro-batches in each cell."""
    work = Workload(1, TOKENS, CellLayout(2 * cells, cells, 1), tail, "float32", "auto", 1 << 20, paged=False)
    step = StepBytes(spec, make_plan(spec.units, [1.0], 3), work, 0, AdamW().state_bytes)
    step.play(training_step(step.shape, fold="rounds" if folded else "nothing"))
    return step


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "tuning", "elements"),
    [
        ("llama", {"type": "full"}, 2 * TOKENS * HIDDEN),  # the rows of two micro-batches
        ("llama", ADAPTERS, 8 * (VOCABULARY + HIDDEN)),
        ("gpt2", {"type": "full"}, 2 * TOKENS * HIDDEN + 256 * HIDDEN),  # and of each position
    ],
)
def test_each_round_more_has_a_sum_more(family, tuning, elements, dtype):
    spec = spec_of(family, tuning, dtype)
    alone, three = (played(spec, cells).phases["embed"][EMBEDDING] for cells in (1, 3))
    assert three - alone == 2 * 4 * elements


def test_where_rows_are_not_enough_the_sum_is_the_whole_table():
    spec = spec_of("llama", {"type": "full"}, "float32")
    names = RootNames(("lm_head.weight", "model.norm.weight"), ("model.embed_tokens.weight",), None)
    whole = replace(spec, root_names=names)
    alone, three = (played(whole, cells).phases["embed"][EMBEDDING] for cells in (1, 3))
    assert three - alone == 2 * 4 * VOCABULARY * HIDDEN


@pytest.mark.parametrize("tail", [0, 4])
@pytest.mark.parametrize("tuning", [{"type": "full"}, ADAPTERS], ids=["full", "adapters"])
def test_alike_rounds_are_counted_as_if_they_were_played(tuning, tail):
    """After the lowest layer's backward all of them wait; behind a whole tail each is reduced before the next."""
    spec = spec_of("llama", tuning, "float32")
    folded, each = (played(spec, 6, tail=tail, folded=folded) for folded in (True, False))
    assert folded.phases["embed"][EMBEDDING] == each.phases["embed"][EMBEDDING]
