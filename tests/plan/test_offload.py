"""Layers' inputs in files: when the plan has them there, what they take of memory and disk, and what wear is told."""

from __future__ import annotations

import pytest
from support.disks import places as places_on
from support.planning import assess, llama_like, node_of, recipe_of

from mlx_empire.disk import with_headroom
from mlx_empire.errors import DoesNotFitError
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.disk import Beside, Keeping, disk_ledgers
from mlx_empire.plan.hardware import wire_named
from mlx_empire.plan.offload import Wear, file_places, input_file_bytes, visits, wear_of, written_bytes
from mlx_empire.plan.pace import pace_of
from mlx_empire.plan.refusal import require_fit
from mlx_empire.plan.resolve import resolve
from mlx_empire.plan.shares import RunPlan
from mlx_empire.plan.workload import step_shape
from mlx_empire.recipe.idle import without_effect

LAYERS, ROWS, WIDTH, HIDDEN = 6, 32, 1024, 128
KEYS = (
    f"batch.global_size={ROWS}",
    "batch.micro_size=1",
    "batch.cells=2",
    f"data.sequence_length={WIDTH}",
    "memory.gradient_checkpointing=true",
    "memory.gradient_dtype=float32",
)
SPEC = llama_like(LAYERS, HIDDEN)
INPUT = 2 * WIDTH * HIDDEN  # bytes of a hidden state in bfloat16
ON, AUTO = "memory.activation_offload=true", "memory.activation_offload=auto"


def plan(limit: int, *more: str, ranks: int = 1) -> RunPlan:
    recipe = recipe_of(*KEYS, *more)
    nodes = [node_of(f"node-{rank}", limit) for rank in range(ranks)]
    return resolve(recipe, SPEC, nodes, state_bytes_of(recipe.optimizer))


def test_memory_then_holds_one_hidden_state_of_each_micro_batch_whatever_the_layers():
    """By hand: without, the inputs of 6 layers and the current states of 32 micro-batches."""
    kept, offloaded = plan(1 << 40), plan(1 << 40, ON)
    assert kept.ledgers[0].phases["backward"]["layer inputs"] == (LAYERS + 1) * ROWS * INPUT
    assert offloaded.ledgers[0].phases["backward"]["layer inputs"] == ROWS * INPUT
    assert "fetched layer inputs" not in kept.ledgers[0].phases["backward"]
    assert 0 < offloaded.ledgers[0].phases["backward"]["fetched layer inputs"] <= 2 * INPUT
    assert offloaded.ledgers[0].peak < 0.7 * kept.ledgers[0].peak


@pytest.mark.parametrize(("ranks", "stage"), [(1, 2), (2, 3), (2, 1)])
def test_the_file_has_a_place_for_each_layer_and_micro_batch(ranks, stage):
    found = plan(1 << 40, ON, f"memory.zero_stage={stage}", ranks=ranks)
    for rank in range(ranks):
        assert input_file_bytes(SPEC, found.shards, found.work, rank) == LAYERS * ROWS // ranks * INPUT
        assert written_bytes(SPEC, found.shards, found.work, rank) == LAYERS * ROWS // ranks * INPUT
    kept = plan(1 << 40)
    assert (
        file_places(step_shape(kept.shards, kept.work, 0))
        == visits(step_shape(kept.shards, kept.work, 0))
        == 0
    )


def test_auto_takes_files_only_where_nothing_fits_without_not_even_waves():
    whole = plan(1 << 40)
    peak = whole.ledgers[0].peak
    least = plan(1, ranks=1).ledgers[0].peak  # in waves of one
    waves = plan(int(0.8 * peak), AUTO)
    assert (waves.work.offload, bool(waves.work.wave)) == (False, True)
    assert plan(1 << 40, AUTO).work == whole.work
    stage_3 = ("memory.zero_stage=3",)  # whose micro-batches pass together
    limit = int(0.9 * max(one.peak for one in plan(1 << 40, *stage_3, ranks=2).ledgers))
    without, found = plan(limit, *stage_3, ranks=2), plan(limit, *stage_3, AUTO, ranks=2)
    assert not without.fits
    assert found.fits
    assert found.work.offload
    hopeless = plan(least // 4, AUTO)
    assert not hopeless.fits
    assert not hopeless.work.offload


def test_nothing_runs_ahead_of_what_is_read():
    ahead = ("memory.run_ahead=true",)
    assert plan(1 << 40, *ahead).work.run_ahead
    assert not plan(1 << 40, *ahead, ON).work.run_ahead
    (line,) = without_effect(recipe_of(*KEYS, *ahead, ON), ["bfloat16"], 2)
    assert "memory.run_ahead: true (memory.activation_offload waits at each layer)" in line
    (line,) = without_effect(recipe_of("memory.gradient_checkpointing=false", ON), ["bfloat16"], 2)
    assert "memory.activation_offload: true (memory.gradient_checkpointing is false" in line


def test_a_refusal_names_it_where_inputs_are_much_of_the_peak():
    nodes = [node_of("node-0", 1 << 24), node_of("node-1", 1 << 24)]
    asked = ("memory.zero_stage=3",)
    with pytest.raises(DoesNotFitError, match=r"try .*memory\.activation_offload: true"):
        require_fit(plan(1 << 24, *asked, ranks=2), nodes)
    with pytest.raises(DoesNotFitError) as told:
        require_fit(plan(1 << 24, *asked, ON, ranks=2), nodes)
    assert "activation_offload" not in str(told.value)


def test_each_disk_needs_room_for_the_files_on_it():
    found = plan(1 << 40, ON, ranks=2)
    inputs = [input_file_bytes(SPEC, found.shards, found.work, rank) for rank in range(2)]
    states = state_bytes_of(recipe_of().optimizer)

    def ledgers(disks, free=None, files=inputs):
        where = places_on(("0", "1"), disks, free)
        return disk_ledgers(SPEC, found.shards, Keeping(0, None, False), states, where, Beside(), files)

    king, soldier = ledgers(("king", "soldier"))
    assert (king.inputs, soldier.inputs) == tuple(inputs)
    assert soldier.least == soldier.asked == with_headroom(inputs[1])
    (one,) = ledgers(("king", "king"))
    (without,) = ledgers(("king", "king"), files=())
    assert one.inputs == sum(inputs)
    assert one.least - without.least == pytest.approx(1.02 * sum(inputs), rel=1e-3)
    _, short = ledgers(("king", "soldier"), {"soldier": inputs[1]})
    assert short.verdict == "no"
    assert "of layers' inputs" in short.reason


def test_the_pace_counts_writing_and_reading_and_the_machine_that_ranks_share():
    """By hand: a CPU's disk does 0.2 to 2 GB/s."""
    recipe = recipe_of(*KEYS, ON)
    seconds = []
    for names in (["a"], ["a", "b"], ["a", "a"]):
        nodes = [node_of(name, 1 << 40) for name in names]
        found = pace_of(assess(recipe, SPEC, nodes), wire_named("10gbe"))
        load = pace_of(assess(recipe_of(*KEYS), SPEC, nodes), wire_named("10gbe")).parts["disk"]
        seconds.append([a - b for a, b in zip(found.parts["disk"], load, strict=True)])
    moved = 2 * LAYERS * ROWS * INPUT
    assert seconds[0] == pytest.approx([moved / 2e9, moved / 2e8], rel=1e-6)
    assert seconds[1] == pytest.approx([moved / 2 / 2e9, moved / 2 / 2e8], rel=1e-6)
    assert seconds[2] == pytest.approx(seconds[0], rel=1e-6)


def test_wear_is_told_by_step_day_and_run():
    """By hand: 50 MB a step; ranks of a machine write to one drive."""
    found = plan(1 << 40, ON, ranks=2)
    step = LAYERS * ROWS * INPUT
    apart = wear_of(SPEC, found, ["a", "b"], 1000, (1.0, 2.0))
    shared = wear_of(SPEC, found, ["a", "a"], 1000, (1.0, 2.0))
    assert apart == Wear("a", step // 2, 500 * step, (step / 2 * 43200, step / 2 * 86400))
    assert shared is not None
    assert shared.step == step
    assert wear_of(SPEC, plan(1 << 40), ["a"], 1000) is None
    told = Wear("king", 10**12, 60 * 10**12, (10**12, 3 * 10**12)).told
    assert "1 TB to 3 TB a day" in told
    assert "the run's 60 TB are 10 % of that" in told
    assert "a day" not in Wear("king", 10**12).told
