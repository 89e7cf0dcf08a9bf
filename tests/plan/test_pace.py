"""Time against hand-made counts: operations, bytes per card and cable, and what overlaps."""

from dataclasses import replace
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.planning import assess, catalog_spec, llama_like, node_of, nodes_of, recipe_of

from mlx_empire.cluster.machine import Calibration
from mlx_empire.errors import UserError
from mlx_empire.plan.chips import chip_named
from mlx_empire.plan.hardware import ADDING_RATE, WIRES, standard_clusters, wire_named
from mlx_empire.plan.lengths import DataSize, Lengths
from mlx_empire.plan.pace import chips_of, cloud_of, ends, pace_of, paces, spell
from mlx_empire.plan.step_traffic import step_matrices, step_traffic
from mlx_empire.plan.work import (
    attention_flops,
    attention_layers,
    flops_per_token,
    trained_bytes,
    update_memory_traffic,
)

GIB = 2**30
CPU = chip_named("CPU")


def assessed(*overrides, limits=(GIB, GIB), spec=None):
    return assess(recipe_of(*overrides), spec or llama_like(), nodes_of(limits))


def test_operations_are_counted_product_by_product():
    """Every matrix of every layer, and the scores, pass by pass, for a model whose head is not recomputed."""
    spec, width = llama_like(layers=3, hidden=128, vocabulary=512), 2048
    layer = 4 * 128 * 128 + 3 * 128 * 512
    scores = 2 * (2 * 128 * width)  # 2 products of 2 operations per channel and position
    root = 2 * 512 * 128  # embedding (counted as if it were a product) and head
    recomputed = assessed("memory.gradient_checkpointing=true", spec=spec)
    kept = assessed("memory.gradient_checkpointing=false", spec=spec)
    assert flops_per_token(spec, recomputed.plan.work) == 4 * 3 * (2 * layer + scores) + 3 * 2 * root
    assert flops_per_token(spec, kept.plan.work) == 3 * 3 * (2 * layer + scores) + 3 * 2 * root


@pytest.mark.parametrize(
    ("checkpointing", "per_parameter"), [("true", 8), ("false", 6)]
)  # the figures that everybody uses
def test_scout_executes_eight_per_active_parameter_less_its_last_products(checkpointing, per_parameter):
    recipe = recipe_of(f"memory.gradient_checkpointing={checkpointing}")
    spec = catalog_spec("llama-4-scout-109b", recipe)
    plan = assess(recipe, spec, standard_clusters()["4K"]).plan
    passes = per_parameter / 2
    expected = per_parameter * 17.17e9 + passes * 48 * 4 * 40 * 128 * 2048
    # Of a layer nothing reads two products, the last ones of the shared and of the chosen expert; embedding and head
    # are not computed again either.
    spared = 48 * 2 * 2 * 5120 * 8192 + 2 * 2 * 5120 * 202048 if per_parameter == 8 else 0
    assert flops_per_token(spec, plan.work) == pytest.approx(expected - spared, rel=0.001)


def test_adapters_spare_the_base_its_weight_gradients_and_quantising_spares_nothing():
    """About 6 per parameter; Apple's 180 tokens/s on a 9 B model then lie within 5-12 TFLOP/s."""
    counted = {}
    for kind in ("full", "lora", "qlora"):
        recipe = recipe_of(f"tuning.type={kind}")
        spec = catalog_spec("gemma-2-9b", recipe)
        work = assess(recipe, spec, [standard_clusters()["4K"][0]]).plan.work
        counted[kind] = flops_per_token(spec, work)
    assert counted["lora"] == pytest.approx(counted["full"] - 2 * 9.24e9, rel=0.01)
    assert counted["qlora"] == pytest.approx(counted["lora"], rel=0.01)
    assert 5e12 < 180 * counted["lora"] < 12e12


def test_what_is_not_computed_again_is_never_dearer_than_what_is():
    """Adapters in the last four layers: layers below them pass once, recomputed or not, and have no gradients."""
    counted = []
    for checkpointing in ("true", "false"):
        words = ("tuning.type=lora", "tuning.layers=4", f"memory.gradient_checkpointing={checkpointing}")
        recipe = recipe_of(*words)
        spec = catalog_spec("llama-3.2-1b", recipe)
        work = assess(recipe, spec, [standard_clusters()["4K"][0]]).plan.work
        counted.append(flops_per_token(spec, work))
    assert counted[1] < counted[0]


def test_attention_with_latents_and_without_heads():
    recipe = recipe_of()
    deepseek = catalog_spec("deepseek-v3-671b", recipe)
    assert attention_flops(deepseek, 100) == 2 * 128 * 100 * (192 + 128)
    assert attention_layers(deepseek) == 61
    headless = replace(llama_like(), config={"hidden_size": 64})
    assert attention_flops(headless, 100) == 0


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from([0, 1, 2, 3]),
    st.sampled_from([1, 2]),
    st.sampled_from(["auto", "direct", "relay"]),
)
@settings(max_examples=40, deadline=None)
def test_gathers_and_reductions_are_the_plan_s_traffic(weights, stage, cells_per_rank, route):
    shares = "[" + ",".join(map(str, weights)) + "]"
    cells = min(8, len(weights) * cells_per_rank)
    found = assessed(
        f"memory.zero_stage={stage}",
        f"memory.shares={shares}",
        f"comm.route={route}",
        f"batch.cells={cells}",
        limits=[GIB] * len(weights),
    )
    gathers, reductions = step_matrices(found.plan.shards, found.plan.work, route)
    total = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(gathers, reductions, strict=True)]
    assert total == step_traffic(found.plan.shards, found.plan.work)


def test_two_equal_nodes_by_hand():
    """Stage 3, two nodes, bfloat16: a gather sends half of a unit each way, a reduction the other half."""
    spec = llama_like(layers=4)
    found = assessed(
        "memory.zero_stage=3", "memory.shares=equal", "memory.gradient_dtype=bfloat16", spec=spec
    )
    root, layer = (u.parameters for u in spec.units[:2])
    gathered = root + 3 * 2 * layer + layer  # layers twice, but the last one, with which the backward begins
    seconds = 2 * (gathered + root + 4 * layer) / 2 / 1.1e9
    reduced = (root + 4 * layer) * 2  # bytes; both nodes' contributions to half of it are added
    pace = pace_of(found, wire_named("10gbe"))
    for i in (0, 1):
        assert pace.parts["network"][1 - i] == pytest.approx(seconds, rel=1e-3)
        assert pace.parts["adding"][1 - i] == pytest.approx(reduced / ADDING_RATE[i], rel=1e-3)
    states = 1 + 1 + 2 + 5 / 64  # codes, remainder, five bytes per block
    moved = spec.base_parameters / 2 * (2 * 2 + 2 + 2 * states)
    assert sum(update_memory_traffic(found, 0)) == pytest.approx(moved, rel=1e-6)
    assert pace.parts["optimizer"][0] == pytest.approx(moved / CPU.memory_rate[1], rel=1e-6)
    tokens = 4 * 2048  # of each node: half of the 8 rows
    compute = tokens * flops_per_token(spec, found.plan.work) / (CPU.tflops[1] * 1e12)
    assert pace.parts["compute"][0] == pytest.approx(compute)
    # The wire binds: all that computes is hidden but the update, and what is waited for before and after.
    assert pace.parts["network"][0] < pace.step_seconds[0] < pace.parts["network"][0] + compute


@given(
    st.sampled_from([0, 1, 2, 3]),
    st.lists(st.integers(1, 8), min_size=1, max_size=4),
    st.sampled_from([8, 16, 64]),
    st.sampled_from(["10gbe", "thunderbolt", "cable", "mesh"]),
)
@settings(max_examples=40, deadline=None)
def test_times_are_ranges_that_hang_together(stage, weights, rows, key):
    found = assessed(
        f"memory.zero_stage={stage}",
        f"memory.shares=[{','.join(map(str, weights))}]",
        f"batch.global_size={rows}",
        limits=[GIB] * len(weights),
    )
    wire = wire_named(key)
    pace = pace_of(found, wire)
    for low, high in (
        pace.step_seconds,
        pace.positions_per_second,
        pace.run_hours,
        pace.energy_kwh,
        *pace.parts.values(),
    ):
        assert 0 <= low <= high
    assert (pace.parts["network"][1] == 0) == (len(weights) == 1)
    assert pace.step_seconds[1] >= max(high for _, high in pace.parts.values())
    assert pace.positions_per_second[0] * pace.step_seconds[1] == pytest.approx(rows * 2048)
    assert pace.run_hours[1] == pytest.approx(pace.step_seconds[1] * 100 / 3600)
    quicker = replace(wire, rate=(2 * wire.rate[0], 2 * wire.rate[1]))
    assert pace_of(found, quicker).step_seconds[1] <= pace.step_seconds[1]
    assert pace.parts[pace.bound] == max(pace.parts.values(), key=sum)


def test_scout_over_slow_and_fast_wires():
    """Few tokens a step leave 10 GbE behind, many hide it; a mesh takes unequal shares direct."""
    recipe = recipe_of("batch.global_size=4")
    spec = catalog_spec("llama-4-scout-109b", recipe)
    found = paces(assess(recipe, spec, standard_clusters()["1K+3S"]))
    assert list(found) == [w.key for w in WIRES]
    assert found["10gbe"].bound == "network"
    assert found["mesh"].parts["network"][1] < found["cable"].parts["network"][0] / 2
    # About 216 GB gathered twice past each card, and 2 bytes per gradient reduced: 0.5 TB at 1.1 GB/s. The king is the
    # hub of the reductions, and adds them as they come: a model of the cluster at 1/24 scale that added after each
    # exchange took 625 to 685 s.
    assert 560 < found["10gbe"].step_seconds[0] < 690
    many = recipe_of("batch.global_size=64", "data.sequence_length=4096")
    assert pace_of(assess(many, spec, standard_clusters()["1K+3S"]), WIRES[0]).bound == "compute"


def test_a_calibration_narrows_the_range():
    found = assess(recipe_of(), llama_like(), [node_of("mac", GIB, chip="Apple M3 Ultra")])
    assert chips_of(found) == [chip_named("M3 Ultra")]
    measured = Calibration("mac", "Apple M3 Ultra", "bfloat16", 10.0, 6e11)
    planned, then = (pace_of(found, WIRES[0], None, c) for c in (None, measured))
    assert planned.parts["compute"][0] < then.parts["compute"][0] < then.parts["compute"][1]
    assert then.parts["compute"][1] < planned.parts["compute"][1]


@given(st.sampled_from([None, "7", "25%", "90s", "30min", "2h"]), st.floats(1, 20000), st.floats(1, 3))
@settings(max_examples=60)
def test_what_comes_when_is_counted_in_whole_steps(written, low, spread):
    """Steps are walked through one by one, a save begun where it is due: against the formula."""
    steps, length = 40, {"90s": 90, "30min": 1800, "2h": 7200}.get(written)
    recipe = recipe_of(f"run.steps={steps}", *([f"run.save_every={written}"] if written else []))
    lengths = Lengths.of(recipe, DataSize.assumed(recipe))
    seconds = (low, low * spread)
    hours = tuple(steps * s / 3600 for s in seconds)
    pace = replace(pace_of(assessed(), WIRES[0]), step_seconds=seconds, run_hours=hours, lengths=lengths)
    if written is None:
        assert pace.first_checkpoint is None
        assert pace.lost == hours
        return
    each = []
    for second in seconds:
        every = {"7": 7, "25%": 10}.get(written)
        first = next(
            n for n in range(1, steps + 1) if n == steps or (n == every if every else n * second >= length)
        )
        each.append(first * second / 3600)
    assert pace.first_checkpoint == pytest.approx((min(each), max(each)))
    assert pace.first_evaluation is None
    for most, worst, second, run in zip(pace.lost, sorted(each), seconds, hours, strict=True):
        assert most == pytest.approx(min(worst + second / 3600, run))


def test_the_end_of_a_run_and_of_all_calendars():
    pace = pace_of(assessed(), WIRES[0])
    start = datetime(2026, 11, 21)
    early, late = ends(replace(pace, run_hours=(24.0, 1e30)), start)
    assert early == datetime(2026, 11, 22)
    assert late.year == 2126


def test_rented_machines_hold_what_is_trained():
    recipe = recipe_of()
    spec = catalog_spec("llama-4-scout-109b", recipe)
    found = assess(recipe, spec, standard_clusters()["1K+3S"])
    bytes_each = sum(trained_bytes(found).values()) / spec.base_parameters
    assert bytes_each == pytest.approx(
        8.08 if found.plan.work.gradient_dtype == "bfloat16" else 10.08, abs=0.02
    )
    pace = pace_of(found, WIRES[0])
    cloud = cloud_of(found, pace.lengths, pace)
    assert cloud.gpus == 16
    assert cloud.gpus * 72e9 > sum(trained_bytes(found).values()) > 8 * 72e9
    assert cloud.hours[1] < pace.run_hours[0]  # the Macs never win on time
    assert cloud.dollars[0] == pytest.approx(16 * cloud.hours[0] * 2.5)
    assert "35,996 dollars" in cloud.sentence
    other = assessed()
    pace = pace_of(other, WIRES[0])
    assert "dollars of power" not in cloud_of(other, pace.lengths, pace).sentence
    assert "not known" in cloud_of(other, pace.lengths, None).sentence


def test_a_plan_with_an_unknown_chip_has_no_pace():
    found = assess(recipe_of(), llama_like(), [node_of("a", GIB), node_of("b", GIB, chip="RTX-5090")])
    with pytest.raises(UserError, match=r"no time: unknown chip RTX-5090 of b: add it to plan/chips.toml"):
        pace_of(found, WIRES[0])


def test_ranges_in_words():
    assert [spell(p) for p in ((0.0123, 0.5), (3.14, 7.0), (12.4, 12.4), (1200.0, 3400.0))] == [
        "0.012 to 0.5",
        "3.1 to 7.0",
        "12",
        "1,200 to 3,400",
    ]
