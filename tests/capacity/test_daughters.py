"""Daughters: sizes against arithmetic by hand, and placements that never overfill a machine."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.planning import catalog_spec, nodes_of, recipe_of

from mlx_empire.capacity.daughters import (
    LORA,
    QLORA4,
    QLORA8,
    WAYS,
    ServedModel,
    daughter_runs,
    kinds,
    place_daughters,
    serving,
    tuned_in,
)
from mlx_empire.model.target import catalog_target
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.hardware import standard_clusters
from mlx_empire.plan.pace import run_dollars
from mlx_empire.plan.serving import USABLE, cache_bytes_per_token

GB = 10**9
CLUSTER = standard_clusters()["1K+3S"]
KING, SOLDIER = CLUSTER[0], CLUSTER[1]


def planned(model):
    """(a recipe, its model as each way tunes it)."""
    recipe = recipe_of(f"model.path={model}", "batch.global_size=4")
    return recipe, {way: catalog_spec(model, tuned_in(recipe, way)) for way in WAYS}


@pytest.fixture(scope="module")
def scout():
    return {
        (r.way, r.node.role): r
        for r in daughter_runs(*planned("llama-4-scout-109b"), CLUSTER, state_bytes_of)
    }


def test_scout_s_daughter_wants_an_8_bit_base_on_a_soldier(scout):
    assert scout[LORA, "soldier"].assessment.verdict in ("tight", "no")
    assert scout[QLORA8, "soldier"].assessment.verdict == "fits"
    assert scout[LORA, "king"].assessment.verdict == "fits"
    assert catalog_target("llama-4-scout-109b", recipe_of("tuning.type=lora")).not_trainable is None


def test_a_base_takes_its_bits_and_two_numbers_per_64_weights(scout):
    parameters = 107.77e9
    for way, bits in ((LORA, 16), (QLORA8, 8 + 32 / 64), (QLORA4, 4 + 32 / 64)):
        weights = scout[way, "king"].assessment.plan.ledgers[0].resident["weights"]
        assert weights == pytest.approx(parameters * bits / 8, rel=0.01)


def test_one_machine_trains_alone_and_costs_power_and_wear(scout):
    run = scout[QLORA8, "king"]
    assert run.pace.parts["network"] == (0, 0)
    hours = run.pace.run_hours
    wear = 11_699 / (3 * 365.25 * 24)
    assert run.dollars[0] == pytest.approx(hours[0] * (wear + 0.27 * 0.15))
    assert run.dollars[1] == pytest.approx(hours[1] * (wear + 0.27 * 0.40))
    twice = run_dollars([KING, KING], run.pace)
    assert twice is not None
    assert twice[0] == pytest.approx(run.dollars[0] + hours[0] * wear), "two machines wear"
    assert run_dollars([KING, *nodes_of([GB])], run.pace) is None, "of one no price is known"
    assert run_dollars([KING], replace(run.pace, energy_kwh=None)) is None, "nor what it draws"


@pytest.mark.parametrize(
    ("model", "per_token"),
    [
        ("llama-3.1-8b", 2 * 2 * 32 * 8 * 128),  # keys and values of 8 heads of 128, 2 bytes, 32 layers
        ("gemma-2-9b", 2 * 2 * 42 * 8 * 256),
        ("deepseek-v3-671b", 2 * 61 * (512 + 64)),  # a latent and the rotary part
        ("deepseek-v2-236b", 2 * 60 * 128 * (192 + 128)),  # mlx-lm caches them unpacked
        ("falcon-7b", 2 * 2 * 32 * 1 * 64),  # one pair for all heads
    ],
)
def test_a_conversation_s_cache(model, per_token):
    assert cache_bytes_per_token(catalog_spec(model, recipe_of())) == per_token


def test_how_many_a_machine_serves():
    """Counted one by one: whole copies, and adapters over one base, in 95 % of the limit."""
    found = {(s.way, s.node.role): s for s in serving(*planned("llama-3.1-8b"), CLUSTER, 4096)}
    assert set(found) == {(w, r) for w in (LORA, QLORA8, QLORA4) for r in ("king", "soldier")}
    for one in found.values():
        room = USABLE * one.node.limit_bytes
        each = one.weight_bytes + one.cache_bytes
        assert one.copies * each <= room < (one.copies + 1) * each
        daughter = one.adapter_bytes + one.cache_bytes
        assert one.weight_bytes + one.daughters * daughter <= room
        assert room < one.weight_bytes + (one.daughters + 1) * daughter
        assert one.cache_bytes == 4096 * 131072
    plain = found[LORA, "king"]
    assert plain.weight_bytes == pytest.approx(16.06e9, rel=0.001)
    assert plain.load_seconds == pytest.approx((16.06 / 6, 16.06 / 3), rel=0.001)
    assert plain.copies < found[QLORA8, "king"].copies < found[QLORA4, "king"].copies
    nothing = {s.way: s for s in serving(*planned("deepseek-v3-671b"), [SOLDIER])}
    assert (nothing[LORA].copies, nothing[LORA].daughters) == (0, 0)


def test_kinds_of_nodes():
    assert [n.name for n in kinds(CLUSTER)] == ["king-1", "soldier-1"]


SIZES = st.lists(st.integers(1, 60), max_size=30)


@given(SIZES, st.lists(st.integers(20, 150), min_size=1, max_size=4), st.booleans())
def test_a_placement_keeps_every_model_once_and_never_overfills(sizes, limits, shared):
    bases = {"even": 30, "odd": 17} if shared else {}
    models = [
        ServedModel(f"m{i}", size, ("even", "odd")[i % 2] if shared else None) for i, size in enumerate(sizes)
    ]
    nodes = nodes_of(limits)
    found = place_daughters(models, nodes, bases)
    by_name = {m.name: m for m in models}
    housed = [name for home in found.homes for name in home]
    assert sorted([*housed, *found.homeless]) == sorted(by_name)
    for node, home, used in zip(nodes, found.homes, found.used_bytes, strict=True):
        own = sum(by_name[name].own_bytes for name in home)
        loaded = {by_name[name].base for name in home} - {None}
        assert used == own + sum(bases[b] for b in loaded)
        assert used <= USABLE * node.limit_bytes
    for name in found.homeless:
        model = by_name[name]
        for node, home, used in zip(nodes, found.homes, found.used_bytes, strict=True):
            there = model.base in {by_name[n].base for n in home}
            extra = model.own_bytes + (0 if model.base is None or there else bases[model.base])
            assert used + extra > int(USABLE * node.limit_bytes)


def test_alike_models_spread_evenly_and_share_their_base():
    nodes = nodes_of([1000, 1000])
    found = place_daughters([ServedModel(f"m{i}", 10) for i in range(8)], nodes)
    assert [len(home) for home in found.homes] == [4, 4]
    shared = place_daughters([ServedModel(f"m{i}", 10, "base") for i in range(8)], nodes, {"base": 900})
    assert shared.used_bytes[0] + shared.used_bytes[1] == 80 + 2 * 900
    assert len(shared.homeless) == 0


def test_a_large_model_keeps_its_machine():
    """Spreading alone would leave 900 without a place; packing finds it one."""
    nodes = nodes_of([1000, 1000])
    found = place_daughters(
        [ServedModel("small-1", 450), ServedModel("small-2", 450), ServedModel("large", 900)], nodes
    )
    assert found.homeless == ()
    assert sorted(map(len, found.homes)) == [1, 2]
