"""A plan's figures with the tiles of attention that it leaves out are those of the whole graph."""

from __future__ import annotations

from typing import Any

import pytest
from support.tiny_models import tiny_config

from mlx_empire.model.attention.folded import blocks_left_out, rows_left_out, tiles_left_out
from mlx_empire.model.layer_costs import LayerCosts
from mlx_empire.model.liveness import play, script
from mlx_empire.model.target import Target, make_target
from mlx_empire.recipe.sections import TuningSection

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_key_value_heads": 2}
ATTENTION = (-1,)  # the product whose results are kept, so that the vjp is the peak and not the forward
slow = pytest.mark.slow
CASES = [  # family, positions, dtype and what differs
    ("llama", 8192, "float32", {}),
    ("llama", 8192, "bfloat16", {}),
    pytest.param("gpt_oss", 8192, "float32", {}, marks=slow),  # sinks, and a window of 64
    pytest.param("gemma3_text", 8192, "float32", {"sliding_window": 700}, marks=slow),
    pytest.param("gemma3_text", 8192, "bfloat16", {"sliding_window": 512}, marks=slow),
    pytest.param("llama", 12288, "float32", {}, marks=slow),
    pytest.param("llama", 17000, "float32", {}, marks=slow),
    pytest.param("llama", 32768, "float32", {}, marks=slow),
    pytest.param("gemma3_text", 16384, "float32", {"sliding_window": 6000}, marks=slow),
]


def target_of(family: str, dtype: str = "float32", **more: Any) -> Target:
    config = tiny_config(family, **{**SIZES, **more})
    return make_target(config, TuningSection.model_validate({"type": "full"}), family, dtype)


def costs_of(target: Target, width: int, *, folds: bool) -> LayerCosts:
    costs = LayerCosts(target.spec, 1, width, 1024, linear=False, by_pattern=True)
    assert costs._passes is not None
    costs._passes.model.blocks.folds = folds
    return costs


def figures(target: Target, width: int, *, folds: bool) -> tuple[list[object], int]:
    """What a plan asks of each kind of layer, the vjp's peak wherever a bundle begins, and the nodes played."""
    costs = costs_of(target, width, folds=folds)
    assert costs._passes is not None
    found: list[object] = []
    nodes = 0
    for unit in {costs._numbers[id(u)]: u for u in target.spec.units[1:]}.values():
        found += [costs.forward(unit), costs.backward(unit, adds="own")]
        number = costs._numbers[id(unit)]
        one = costs._passes.backward(number, adds="wide", kept=ATTENTION)
        written = script(one.graph)
        found += [play(written, bundled=start)[0].peak for start in range(10)]
        nodes += len(one.graph.nodes)
    return found, nodes


@pytest.mark.parametrize(("family", "width", "dtype", "more"), CASES)
def test_the_figures_are_those_of_the_whole_graph(family, width, dtype, more):
    target = target_of(family, dtype, **more)
    (folded, fewer), (whole, all_nodes) = (figures(target, width, folds=f) for f in (True, False))
    assert folded == whole
    assert fewer < 0.6 * all_nodes


@pytest.mark.parametrize("ahead", [pytest.param(True, marks=slow)])
def test_also_where_the_main_thread_runs_ahead_and_behind_a_tail(ahead):
    target = target_of("llama")
    unit = target.spec.units[1]

    def asked(folds: bool) -> list[object]:
        costs = costs_of(target, 12288, folds=folds)
        tail = costs.tail(target.spec.units[-2:], adds="own")
        return [
            costs.forward(unit, ahead=ahead),
            costs.backward(unit, adds="own", ahead=ahead),
            costs.backward(unit, adds="wide", ahead=ahead, kept=ATTENTION),
            tail,
        ]

    assert asked(True) == asked(False)


def test_the_graph_of_a_very_long_row_is_small():
    target = target_of("llama")
    costs = costs_of(target, 131072, folds=True)
    assert costs._passes is not None
    assert len(costs._passes.backward(1, adds="").graph.nodes) < 12000  # 78,104 where nothing is left out


def test_so_many_are_left_out_as_have_a_multiple_of_ten_tasks_and_some_stay_on_both_sides():
    for count in range(2, 300):
        for left_out, period in (
            (blocks_left_out(count), 10),
            (tiles_left_out(count), 10),
            (rows_left_out(count, 0, 4), 20),
            (rows_left_out(count, 3, 4), 10),
        ):
            assert len(left_out) % period == 0
            assert not left_out or (left_out.start >= 1 and left_out.stop <= count - 4)
