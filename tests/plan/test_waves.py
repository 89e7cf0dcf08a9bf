"""Micro-batches pass in waves where all of them together would not fit and weights stay whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.planning import llama_like, node_of, recipe_of

from mlx_empire.cluster.hostfile import Node
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.fill import Recomputation
from mlx_empire.plan.resolve import resolve
from mlx_empire.plan.shares import RunPlan
from mlx_empire.plan.step_traffic import step_traffic

MIB = 1 << 20
# Inputs of 32 micro-batches are most of what a step needs.
KEYS = (
    "batch.global_size=32",
    "batch.micro_size=1",
    "batch.cells=2",
    "data.sequence_length=1024",
    "memory.gradient_checkpointing=true",
    "memory.gradient_dtype=float32",
)
SPEC = llama_like(6, 128)


def plan(limit: int, *more: str, ranks: int = 1, noted: Recomputation | None = None) -> RunPlan:
    recipe = recipe_of(*KEYS, *more)
    nodes: list[Node] = [node_of(f"node-{rank}", limit) for rank in range(ranks)]
    return resolve(recipe, SPEC, nodes, state_bytes_of(recipe.optimizer), noted)


def test_the_less_memory_there_is_the_smaller_are_the_waves_and_what_does_not_fit_then_is_told_in_waves_of_one():
    whole = plan(1 << 40)
    assert whole.work.wave == 0
    peak = whole.ledgers[0].peak
    inputs = sum(size for name, size in whole.ledgers[0].items().items() if name == "layer inputs")
    assert inputs > 0.5 * peak
    waves, runs_ahead = [], []
    for part in (0.9, 0.8, 0.75, 0.7, 0.65):
        found = plan(int(part * peak))
        assert found.comfortable
        assert replace(found.work, wave=0) == whole.work
        ahead = plan(int(part * peak), "memory.run_ahead=true")  # where that leaves headroom
        assert ahead.comfortable
        assert replace(ahead.work, run_ahead=False) == found.work
        runs_ahead.append(ahead.work.run_ahead)
        waves.append(found.work.wave)
    assert waves == sorted(waves, reverse=True)
    assert any(runs_ahead)
    assert 16 >= waves[0] > waves[-1] >= 1
    least = plan(peak // 8)
    assert not least.fits
    assert least.work.wave == 1


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_only_where_weights_stay_whole(stage):
    asked = f"memory.zero_stage={stage}"
    whole = plan(1 << 40, asked, ranks=2)
    tight = plan(int(0.8 * max(one.peak for one in whole.ledgers)), asked, ranks=2)
    assert bool(tight.work.wave) == (stage in (0, 2))
    assert tight.comfortable == (stage in (0, 2))
    assert step_traffic(tight.shards, tight.work) == step_traffic(whole.shards, whole.work)


def test_a_run_that_goes_on_with_less_memory_keeps_what_it_noted_and_passes_in_waves():
    asked = ("memory.gradient_checkpointing=auto", "memory.keep_products=true")
    noted = Recomputation(1, ((2, (0,)), (3, (1,))))
    whole = plan(1 << 40, *asked, noted=noted)
    assert (whole.work.wave, Recomputation.of(whole.work)) == (0, noted)
    less = plan(int(0.85 * whole.ledgers[0].peak), *asked, noted=noted)
    assert less.fits
    assert less.work.wave > 0
    assert Recomputation.of(less.work) == noted
