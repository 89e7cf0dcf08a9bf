"""Verdicts and figures that must be told: Scout on the empire, what does not fit anywhere, and the three limits."""

from pathlib import Path

import pytest
from support.planning import MIB, assess, catalog_spec, llama_like, nodes_of, recipe_of

from mlx_empire.capacity.whatif import fits_at_least
from mlx_empire.cluster.hostfile import Node, load_hostfile
from mlx_empire.formats.hf_folder import stored_if_whole
from mlx_empire.model.target import planned_target
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.assess import MOST_LIVE_BUFFERS, Assessment, chunk_count
from mlx_empire.plan.resolve import never_fits
from mlx_empire.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
SEVEN_BYTES = ["optimizer.master_weights=diet", "memory.gradient_dtype=bfloat16"]
SHORT = ["data.sequence_length=2048", "batch.global_size=4"]
SOLDIER = Node("soldier", 1, "soldier", 256 << 30, 208 << 30)


def assessed(name: str, *overrides: str, hosts: str = "empire") -> Assessment:
    recipe = load_recipe(ROOT / "recipes/scout.yaml", [*SHORT, *overrides])
    nodes = [
        Node(h.name, h.slots, h.role, h.memory_bytes or 0, h.limit_bytes or 0)
        for h in load_hostfile(ROOT / f"hosts/{hosts}.txt").nodes
    ]
    return assess(recipe, catalog_spec(name, recipe), nodes)


def on_one_soldier(name: str, *overrides: str) -> Assessment:
    one = [*SHORT, "batch.global_size=1", *overrides]
    recipe = load_recipe(ROOT / "recipes/scout.yaml", one)
    return assess(recipe, catalog_spec(name, recipe), [SOLDIER])


def gigabytes(assessment: Assessment) -> list[float]:
    return [round(node.peak_bytes / 1e9, 1) for node in assessment.nodes]


SCOUT = "llama-4-scout-109b"


def test_zero_2_does_not_fit_scout_on_a_soldier_even_without_any_optimizer():
    found = assessed(SCOUT, *SEVEN_BYTES, "memory.zero_stage=2", "memory.shares=[100000, 1, 1, 1]")
    assert found.verdict == "no"
    assert found.worst.node.role in ("king", "soldier")
    soldier = found.nodes[-1]
    assert soldier.share == pytest.approx(0, abs=1e-4)
    assert soldier.peak_bytes / 1e9 == pytest.approx(234, abs=3)
    assert "needs 218" in soldier.reason
    assert "weights alone take 201 GiB" in soldier.reason


def test_zero_3_in_equal_shares_is_tight_and_in_weighted_shares_fits():
    equal = assessed(SCOUT, *SEVEN_BYTES, "memory.zero_stage=3", "memory.shares=equal")
    assert gigabytes(equal)[1] == pytest.approx(219.5, abs=2)
    assert equal.verdict == "tight"
    weighted = assessed(SCOUT, *SEVEN_BYTES)
    assert (weighted.verdict, weighted.zero_stage) == ("fits", 3)
    king, *soldiers = gigabytes(weighted)
    assert 360 <= king <= 385
    assert all(166 <= s <= 180 for s in soldiers)
    assert min(n.headroom_bytes / n.limit_bytes for n in weighted.nodes) > 0.2


def test_a_lora_daughter_of_scout_on_one_soldier_needs_an_8_bit_base():
    lora = on_one_soldier(SCOUT, "tuning.type=lora", "tuning.rank=16")
    assert lora.verdict in ("tight", "no")
    packed = on_one_soldier(SCOUT, "tuning.type=qlora", "tuning.bits=8", "tuning.rank=16")
    assert packed.verdict == "fits"
    assert packed.nodes[0].peak_bytes < 0.6 * lora.nodes[0].peak_bytes


def test_falcon_180b_fits_only_once_gradients_are_released():
    assert assessed("falcon-180b", *SEVEN_BYTES).verdict == "no"
    assert (
        7 * 178_557_088_768 > 0.99 * (464 + 3 * 208) * 2**30 > 5 * 178_557_088_768
    )  # what pooling would say
    assert assessed("falcon-180b", *SEVEN_BYTES, "optimizer.in_backward=true").verdict != "no"


@pytest.mark.parametrize("hosts", ["empire", "2k2s", "3k1s", "4k"])
def test_deepseek_v3_fits_nowhere(hosts):
    assert assessed("deepseek-v3-671b", *SEVEN_BYTES, hosts=hosts).verdict == "no"


@pytest.mark.parametrize(
    ("name", "exact", "diet"),
    [
        (SCOUT, "fits", "fits"),
        ("mistral-large-123b", "fits", "fits"),
        ("mixtral-8x22b", "no", "fits"),
    ],
)
def test_what_the_exact_master_costs(name, exact, diet):
    found = assessed(name, "memory.gradient_dtype=bfloat16").verdict
    assert (found == "no") == (exact == "no")
    assert (assessed(name, *SEVEN_BYTES).verdict == "no") == (diet == "no")


def test_a_ledger_adds_up_and_every_rank_is_there():
    found = assessed(SCOUT)
    assert sum(n.share for n in found.nodes) == pytest.approx(1)
    for node in found.nodes:
        assert node.peak_bytes == sum(node.ledger.items().values())
        assert node.headroom_bytes == node.limit_bytes - node.peak_bytes
        assert 0 < node.live_buffers < MOST_LIVE_BUFFERS
        assert node.largest_array_bytes < node.buffer_limit_bytes


def test_one_array_above_the_buffer_limit_is_a_no_whatever_is_left():
    # By masks, on a node that is not known to be a Mac: the scores of one layer's attention are an array of their own.
    asked = "data.sequence_length=65536", "optimizer.state_bits=8", "numerics.attention=mask"
    found = on_one_soldier("llama-3.2-1b", *asked)
    assert found.nodes[0].largest_array_bytes == 32 * 65536**2 * 2
    assert found.verdict == "no"


def test_chunks_are_counted_as_they_are_cut():
    plan = assessed("llama-3.2-1b").plan.shards
    for unit in plan.units[:2]:
        for segment in unit.segments:
            for rank in range(4):
                a, b = plan.state_interval(segment, rank)
                assert chunk_count(segment, a, b) == len(list(segment.chunks(a, b)))


def test_a_plan_with_headroom_comes_before_one_that_moves_less_and_is_tight():
    wide = "memory.gradient_dtype=float32"
    comfortable, hurried = assessed("llama-2-70b", wide), assessed("llama-2-70b", wide, "memory.zero_stage=2")
    assert (comfortable.verdict, comfortable.zero_stage, hurried.verdict) == ("fits", 3, "tight")


def test_bfloat16_gradients_with_headroom_come_before_float32_ones_without():
    chosen, wide = (assessed("llama-4-scout-109b", *o) for o in ((), ("memory.gradient_dtype=float32",)))
    assert (chosen.verdict, chosen.plan.work.gradient_dtype, wide.verdict) == ("fits", "bfloat16", "no")


def test_where_nothing_fits_the_least_overfull_plan_is_reported():
    """A giant and a dwarf: at stage 1 the bytes that lack are fewest, at stage 3 the dwarf is least too full."""
    tiny, nodes = llama_like(layers=4, hidden=512, vocabulary=4096), nodes_of([120 * MIB, 8 * MIB])
    found = assess(recipe_of(), tiny, nodes)
    by_stage = {stage: assess(recipe_of(f"memory.zero_stage={stage}"), tiny, nodes) for stage in range(4)}
    overload = {s: max(n.peak_bytes / n.limit_bytes for n in a.nodes) for s, a in by_stage.items()}
    lack = {s: max(n.peak_bytes - n.limit_bytes for n in a.nodes) for s, a in by_stage.items()}
    assert {a.verdict for a in by_stage.values()} == {"no"}
    assert min(lack, key=lambda s: lack[s]) != (best := min(overload, key=lambda s: overload[s]))
    assert found.zero_stage == best


def test_where_nothing_fits_all_machines_are_overfull_alike_and_no_other_shares_are_better():
    spec, nodes = llama_like(layers=64, hidden=512, vocabulary=4096), nodes_of([1000 * MIB, 700 * MIB])

    def overload(*overrides: str) -> list[float]:
        found = assess(recipe_of("memory.zero_stage=3", *overrides), spec, nodes)
        return [n.peak_bytes / n.limit_bytes for n in found.nodes]

    king, soldier = overload()
    assert min(king, soldier) > 1.2
    assert king == pytest.approx(soldier, rel=0.05)
    for shares in ("[1, 1]", "[3, 2]", "[2, 1]", "[3, 1]"):
        assert max(king, soldier) <= 1.03 * max(overload(f"memory.shares={shares}"))


@pytest.mark.parametrize("limits", [(1, 1, 1), (3, 2, 2)])
def test_where_memory_abounds_shares_are_as_the_limits(limits):
    """Whose unit a tensor's gradient is when a step needs most makes no machine's share larger than its equal's."""
    recipe = recipe_of(
        f"model.path={ROOT / 'tests/fixtures/tiny-llama-260k'}", "model.dtype=float32", "data.sequence_length=64",
        "batch.global_size=6", "batch.micro_size=1", "batch.cells=4", "memory.zero_stage=2",
    )  # fmt: skip
    spec = planned_target(recipe, stored_if_whole).spec
    found = assess(recipe, spec, nodes_of([limit << 30 for limit in limits]))
    expected = [limit / sum(limits) for limit in limits]
    assert [node.share for node in found.nodes] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("shares", ["equal", "memory"])
@pytest.mark.parametrize("stage", [0, 3])
def test_weights_and_states_are_too_much_from_the_byte_on_where_the_whole_ledger_has_them(stage, shares):
    """At stage 3 all ranks together keep each once; at stage 0, and for all else, a step needs more."""
    recipe = recipe_of(f"memory.zero_stage={stage}", f"memory.shares={shares}")
    spec, states = llama_like(), state_bytes_of(recipe.optimizer)
    found = assess(recipe, spec, nodes_of([1 << 40, 1 << 39]))
    kept = [
        size
        for one in found.plan.ledgers
        for name, size in one.resident.items()
        if name == "weights" or name.startswith("optimizer ")
    ]
    least = sum(kept) // (1 if stage == 3 else 2)
    for limits in ([least - 64, 64], [least // 2, least - least // 2]):
        assert not never_fits(spec, nodes_of(limits), states)
    too_few = nodes_of([least - 65, 64])
    assert never_fits(spec, too_few, states)
    assert assess(recipe, spec, too_few).verdict == "no"


def test_no_plan_is_made_to_say_that_weights_and_states_are_too_much(monkeypatch):
    recipe = recipe_of("memory.gradient_checkpointing=auto")
    found = assess(recipe, llama_like(), nodes_of([MIB]))
    with monkeypatch.context() as patched:
        patched.setattr("mlx_empire.capacity.whatif.assess", None)
        assert not fits_at_least(found, {"data.sequence_length": 256})
    assert fits_at_least(found, {}, nodes_of([MIB << 10]))
