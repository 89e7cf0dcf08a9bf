"""Advice is believed only where it was tried: every setting is typed into the loader and planned anew."""

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.planning import MIB, assess, catalog_spec, llama_like, nodes_of, recipe_of

from mlx_empire.capacity.advice import advise
from mlx_empire.capacity.improve import largest_micro, longest_sequence
from mlx_empire.plan.hardware import standard_clusters, wire_named
from mlx_empire.plan.pace import pace_of
from mlx_empire.recipe.changes import typed, value, variant
from mlx_empire.sizes import GIB

OVERRIDE = re.compile(r"[a-z]+\.[a-z_]+=\S+")
TINY = llama_like(layers=4, hidden=512, vocabulary=4096)
CLUSTER = standard_clusters()["1K+3S"]


def verdict_with(overrides, given_, nodes, spec):
    """The verdict of a recipe that the trainer's own loader accepts."""
    return assess(recipe_of(*given_, *overrides), spec, nodes).verdict


@given(
    st.lists(st.integers(40, 400), min_size=1, max_size=3),
    st.sampled_from(["auto", "0", "1", "2", "3"]),
    st.sampled_from(["equal", "memory"]),
    st.sampled_from(["true", "false"]),
    st.sampled_from(["8", "32"]),
    st.sampled_from(["1", "4"]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
@pytest.mark.slow
def test_settings_that_are_advised_load_and_fit_and_none_of_them_is_idle(
    limits, stage, shares, whole, bits, micro
):
    wanted = [
        f"memory.zero_stage={stage}",
        f"memory.shares={shares}",
        f"memory.gradient_checkpointing={whole}",
        f"optimizer.state_bits={bits}",
        f"batch.micro_size={micro}",
        "batch.global_size=16",
    ]
    nodes = nodes_of([MIB * n for n in limits])
    found = assess(recipe_of(*wanted), TINY, nodes)
    assume(found.verdict == "no")
    for advice in advise(found):
        assert advice.verdict in ("fits", "tight")
        overrides = advice.change.split(" ")
        if not all(OVERRIDE.fullmatch(o) for o in overrides):
            continue
        assert verdict_with(overrides, wanted, nodes, TINY) == advice.verdict
        lengths = {"data.sequence_length", "batch.global_size"}
        for left_out in overrides:
            others = [o for o in overrides if o != left_out]
            if left_out.split("=")[0] not in lengths and others:
                assert verdict_with(others, wanted, nodes, TINY) == "no", f"{left_out} was not needed"


@given(st.lists(st.integers(150, 900), min_size=1, max_size=3), st.sampled_from(["auto", "2", "3"]))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_what_is_better_is_better_and_the_next_larger_does_not_fit(limits, stage):
    given_ = [f"memory.zero_stage={stage}", "data.sequence_length=512"]
    nodes = nodes_of([MIB * n for n in limits])
    found = assess(recipe_of(*given_), TINY, nodes)
    assume(found.verdict != "no")
    for advice in advise(found):
        overrides = advice.change.split(" ")
        if all(OVERRIDE.fullmatch(o) for o in overrides):
            assert verdict_with(overrides, given_, nodes, TINY) != "no"
            assert advice.verdict in ("fits", found.verdict), "nothing may take the room that there was"
        else:
            assert (
                advice.change in ("as it is", "Thunderbolt cables, TCP over them")
                or "sysctl" in advice.change
            )
    longest = longest_sequence(found)
    length = longest.recipe.data.sequence_length if longest else 512
    longer = 256 * int(length / 256 * 1.04 + 2)
    if longer <= 65536:
        verdict = verdict_with([f"data.sequence_length={longer}"], given_, nodes, TINY)
        assert verdict != "fits" if found.verdict == "fits" else verdict == "no"
    micro = largest_micro(found)
    if micro is not None:
        size = micro.recipe.batch.micro_size
        assert 8 % size == 0
        assert 8 // size >= min(len(nodes), 8)


def test_the_faster_setting_is_faster():
    recipe = recipe_of("memory.zero_stage=3", "memory.gradient_checkpointing=true")
    found = assess(recipe, TINY, nodes_of([8 * GIB, 8 * GIB]))
    wire = wire_named("10gbe")
    best = advise(found, wire)[0]
    changed = recipe_of("memory.gradient_checkpointing=true", *best.change.split(" "))
    before, after = pace_of(found, wire), pace_of(assess(changed, TINY, nodes_of([8 * GIB, 8 * GIB])), wire)
    assert sum(after.step_seconds) < 0.99 * sum(before.step_seconds)


def scout(*overrides, nodes=CLUSTER):
    recipe = recipe_of("batch.global_size=4", *overrides)
    return assess(recipe, catalog_spec("llama-4-scout-109b", recipe), nodes)


def test_scout_at_stage_2_needs_stage_3_and_nothing_else():
    (advice,) = advise(scout("memory.zero_stage=2"))
    assert (advice.change, advice.verdict) == ("memory.zero_stage=3", "fits")


def test_scout_in_equal_shares_with_exact_masters_needs_weighted_ones():
    (advice,) = advise(scout("memory.zero_stage=3", "memory.shares=equal"))
    assert advice.change == "memory.shares=memory"


def test_scout_from_the_dearest_setting_needs_four_changes_in_their_order():
    dear = [
        "memory.zero_stage=1",
        "memory.shares=equal",
        "optimizer.state_bits=32",
        "memory.gradient_checkpointing=false",
    ]
    (advice,) = advise(scout(*dear))
    names = [o.split("=")[0] for o in advice.change.split(" ")]
    assert names[:2] == ["memory.shares", "memory.zero_stage"]
    assert names[-1] == "optimizer.state_bits"


def test_few_tokens_over_10_gbe_are_told_to_do_more_per_gather():
    found = advise(scout())
    assert [a.change.split("=")[0] for a in found[1:3]] == [
        "batch.global_size",
        "Thunderbolt cables, TCP over them",
    ]
    assert "a gather serves" in found[1].effect


def test_mixtral_8x22b_wants_the_diet_master_then_raised_limits_before_machines_and_machines_before_clouds():
    recipe = recipe_of("batch.global_size=4")
    found = advise(assess(recipe, catalog_spec("mixtral-8x22b", recipe), CLUSTER))
    assert (found[0].change, found[0].verdict) == ("optimizer.master_weights=diet", "fits")
    assert found[1].change.startswith(
        "sudo sysctl iogpu.wired_limit_mb=507904 on king-1 (in the hostfile limit=496GiB)"
    )
    assert [a.change for a in found[2:]] == ["another soldier (256 GB)", "another king (512 GB)"]
    assert "8,099 dollars" in found[2].effect


def test_what_no_setting_makes_fit_is_offered_a_cloud_last():
    recipe = recipe_of("batch.global_size=4", "optimizer.master_weights=diet")
    found = advise(assess(recipe, catalog_spec("deepseek-v2-236b", recipe), CLUSTER))
    assert re.fullmatch(r"a cloud burst on \d+ x H100", found[-1].change)
    assert "hours" in found[-1].effect
    assert "dollars" in found[-1].effect


def test_deepseek_v3_is_left_to_rented_machines():
    recipe = recipe_of("batch.global_size=4")
    found = advise(assess(recipe, catalog_spec("deepseek-v3-671b", recipe), CLUSTER))
    assert [a.change.rpartition(" on ")[0] for a in found] == ["a cloud burst"]


def test_maverick_on_four_kings_is_told_of_adapters_and_of_the_memory_that_lacks():
    """3.2 TB for full tuning, 0.8 TB for LoRA; no setting and no few machines more would do."""
    given_, kings = ["batch.global_size=32", "data.sequence_length=4096"], standard_clusters()["4K"]
    recipe, name = recipe_of(*given_), "llama-4-maverick-400b"

    def retuned(changed):
        return catalog_spec(name, changed)

    spec = retuned(recipe)
    found = assess(recipe, spec, kings)
    adapters, more, cloud = advise(found, retuned=retuned)
    assert adapters.change == "tuning.type=lora"
    assert "adapters only" in adapters.effect
    changed = recipe_of(*given_, "tuning.type=lora")
    assert assess(changed, retuned(changed), kings).verdict == adapters.verdict == "fits"
    times = float(re.fullmatch(r"machines with (\d+\.\d) x the memory", more.change)[1])
    for factor, fits in ((times, True), (times - 0.1, False)):
        nodes = [replace(n, limit_bytes=int(factor * n.limit_bytes)) for n in kings]
        assert (assess(recipe, spec, nodes).verdict != "no") == fits
    assert cloud.change.startswith("a cloud burst")


def test_released_gradients_are_advised_before_shorter_rows():
    """Falcon 180B on 1K+3S with the diet master: 4 % too much until gradients are not kept."""
    recipe = recipe_of("batch.global_size=4", "optimizer.master_weights=diet", "memory.zero_stage=3")
    spec = catalog_spec("falcon-180b", recipe)
    first = advise(assess(recipe, spec, CLUSTER))[0]
    assert "optimizer.in_backward=true" in first.change.split(" ")
    assert "sequence_length" not in first.change
    assert (
        verdict_with(
            first.change.split(" "), ["batch.global_size=4", "optimizer.master_weights=diet"], CLUSTER, spec
        )
        != "no"
    )


def test_long_rows_are_halved_with_as_many_tokens_a_step():
    """Too long for one machine, whatever the free settings; a second machine would not shorten a row either."""
    given_ = ["data.sequence_length=32768", "batch.global_size=2"]
    found = assess(recipe_of(*given_), TINY, nodes_of([700 * MIB]))
    assert found.verdict == "no"
    (advice,) = advise(found)
    changed = dict(o.split("=") for o in advice.change.split(" "))
    assert set(changed) == {"data.sequence_length", "batch.global_size"}
    assert int(changed["data.sequence_length"]) * int(changed["batch.global_size"]) == 2 * 32768


def test_a_variant_reads_as_typed():
    recipe = recipe_of()
    changes = {"memory.zero_stage": 3, "memory.gradient_checkpointing": False}
    other = variant(recipe, changes)
    assert typed(changes) == "memory.zero_stage=3 memory.gradient_checkpointing=false"
    assert other == recipe_of(*typed(changes).split(" "))
    assert value(other, "memory.zero_stage") == 3
    assert recipe.memory.zero_stage == "auto"


@pytest.mark.parametrize("limit", [208 * GIB, 216 * GIB])
def test_a_tight_plan_is_offered_room(limit):
    nodes = [replace(n, limit_bytes=limit) if n.role == "soldier" else n for n in CLUSTER]
    found = scout("data.sequence_length=9728", nodes=nodes)
    raised = [a for a in advise(found) if "sysctl" in a.change]
    assert bool(raised) == (found.verdict == "tight")
