"""Time, advice and daughters for every family that the trainer streams, from its configuration alone."""

import json

import pytest
from support.planning import MIB, assess, nodes_of, recipe_of
from support.tiny_models import FAMILIES, OTHER_FAMILIES, tiny_config

from mlx_empire.capacity.advice import advise
from mlx_empire.capacity.daughters import WAYS, daughter_runs, serving, tuned_in
from mlx_empire.model.target import planned_target
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.pace import paces
from mlx_empire.plan.serving import cache_bytes_per_token

DAILY = ("llama", "qwen3_moe", "mamba2", "deepseek_v2")


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in DAILY else pytest.mark.slow)
        for family in (*FAMILIES, *OTHER_FAMILIES)
    ],
)
def test_a_report_can_be_made(family, tmp_path):
    window = {"sliding_window": 256} if family == "gemma2" else {}  # longer rows are refused
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(family, **window)), encoding="utf-8")
    given = ["model.dtype=float32", "data.sequence_length=256", "memory.gradient_checkpointing=auto"]
    recipe = recipe_of(f"model.path={tmp_path}", *given)
    spec = planned_target(recipe).spec
    for limits in ([64 * MIB, 128 * MIB], [MIB]):
        found = assess(recipe, spec, nodes_of(limits))
        assert {a.verdict for a in advise(found)} <= {"fits", "tight"}
        for pace in paces(found).values():
            assert 0 < pace.step_seconds[0] <= pace.step_seconds[1] < 1e6
    assert (cache_bytes_per_token(spec) == 0) == (family == "mamba2")
    targets = {way: planned_target(tuned_in(recipe, way)) for way in WAYS}
    assert all(target.not_trainable is None for target in targets.values())
    specs = {way: target.spec for way, target in targets.items()}
    assert len(daughter_runs(recipe, specs, nodes_of([64 * MIB]), state_bytes_of)) == len(WAYS)
    assert all(one.copies > 0 for one in serving(recipe, specs, nodes_of([64 * MIB])))
