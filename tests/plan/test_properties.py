"""What holds of the plan's small pure functions for any numbers; those that have a file of their own are not here."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.planning import assess, llama_like, node_of, nodes_of, recipe_of
from support.tiny_models import tiny_config

from mlx_empire.errors import DoesNotFitError, UserError
from mlx_empire.model.build import build_model, describe
from mlx_empire.model.spec import ITEM_BYTES
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.assess import LEAST_CACHE_BYTES, cache_bound
from mlx_empire.plan.hardware import WIRES, hourly_wear, wire_of
from mlx_empire.plan.kept import kept_bytes, order_of, saved_operations
from mlx_empire.plan.memory import ledger
from mlx_empire.plan.node_kernels import linear_in
from mlx_empire.plan.optimizer_bytes import state_sizes
from mlx_empire.plan.refusal import needs_in_words, require_fit
from mlx_empire.plan.resolve import reached_layers
from mlx_empire.plan.serving import cache_bytes_per_token, resting_bytes, serving_room
from mlx_empire.plan.shards import make_plan
from mlx_empire.plan.traffic import (
    DEFAULT_EAGER_LIMIT,
    HEADER_BYTES,
    UNASKED_FACT,
    agreed_unasked_bytes,
    unasked_bytes,
)
from mlx_empire.plan.wired_limit import (
    KEPT_FOR_MACOS,
    LEAST_FREE_BYTES,
    most_raised,
    raising_commands,
    untouched,
    wired_bytes,
)
from mlx_empire.plan.work import attention_flops, unit_flops
from mlx_empire.plan.workload import chunk_tokens
from mlx_empire.sizes import GIB, amount

MAC, OTHER = "M3-Ultra", "H100"
macs = st.builds(
    lambda memory, part, chip, measured: replace(
        node_of("n", int(memory * part)), memory_bytes=memory, chip=chip, measured=measured
    ),
    st.integers(16, 1024).map(lambda n: n * GIB),
    st.floats(0.3, 1.0),
    st.sampled_from([MAC, OTHER]),
    st.booleans(),
)


@given(macs)
def test_an_untouched_mac_has_no_more_and_a_raised_one_no_less(node):
    lowered, raised = untouched(node), most_raised(node)
    assert lowered.limit_bytes <= node.limit_bytes <= raised.limit_bytes
    assert untouched(lowered) == lowered
    assert most_raised(raised) == raised
    if node.chip != MAC:
        assert lowered == raised == node
    else:
        assert raised.limit_bytes == max(node.limit_bytes, node.memory_bytes - KEPT_FOR_MACOS)
        assert node.measured <= (lowered == node)


@given(macs, st.floats(0.0, 1.2), st.one_of(st.sampled_from(["auto", "off"]), st.integers(0, 2**41)))
def test_what_is_wired_covers_the_plan_and_leaves_room(node, part, asked):
    peak = int(part * node.limit_bytes)
    if asked not in ("auto", "off"):
        if asked > node.limit_bytes:
            with pytest.raises(UserError, match=r"memory\.wired"):
                wired_bytes(asked, peak, node)
        else:
            assert wired_bytes(asked, peak, node)[0] == asked
        return
    size, why = wired_bytes(asked, peak, node)
    assert why
    assert asked == "auto" or size == 0
    if size:
        assert peak <= size <= min(node.limit_bytes, node.memory_bytes - LEAST_FREE_BYTES)


@given(st.lists(st.tuples(st.sampled_from("abc"), *[st.integers(0, 2**40)] * 3), max_size=6))
def test_a_machine_is_told_a_command_where_that_lets_its_ranks_in(ranks):
    peaks = [peak for _, peak, _, _ in ranks]
    higher = [node_of(name, limit) for name, _, limit, _ in ranks]
    now = [node_of(name, limit) for name, _, _, limit in ranks]
    told = raising_commands(peaks, higher, now)
    for name in "abc":
        peak, raised, has = (sum(one[n] for one in ranks if one[0] == name) for n in (1, 2, 3))
        assert (name in told) == (peak > has and raised > has)
        if name in told:
            assert told[name].endswith(f"={raised // 2**20}")


@given(st.integers(0, 2**20), st.integers(0, 2**20), st.booleans())
def test_a_chunk_of_the_loss_is_a_power_of_two_and_no_longer_with_more_words(some, more, frozen):
    few, many = sorted((some, more))
    tokens = chunk_tokens(few, frozen=frozen)
    assert tokens.bit_count() == 1
    assert 128 <= chunk_tokens(many, frozen=frozen) <= tokens <= 4096
    assert chunk_tokens(few, frozen=True) <= chunk_tokens(few)
    assert tokens == 128 or tokens * few <= 2**25


@given(st.integers(1, 4), st.integers(1, 4).map(lambda n: 64 * n), st.integers(1, 4096), st.integers(1, 3))
@settings(max_examples=25)
def test_serving_and_attention_count_what_a_plain_model_has(layers, hidden, width, times):
    spec = llama_like(layers, hidden)
    tensors = [t for u in spec.units for t in u.tensors]
    both = [resting_bytes(spec, trained=trained) for trained in (True, False)]
    assert sum(both) == sum(t.size * ITEM_BYTES[t.dtype] for t in tensors)
    assert both[1] == 0, "all of it trains"
    assert (
        cache_bytes_per_token(spec) == layers * 2 * 2 * hidden
    )  # a key and a value of each head, in bfloat16
    assert attention_flops(spec, width) == 4 * width * hidden
    assert attention_flops(spec, times * width) == times * attention_flops(spec, width)
    assert reached_layers(spec) == layers


@given(st.integers(1, 2**42), st.integers(1, 2**42))
def test_what_is_left_of_a_machine_is_less_than_it(one, other):
    assert serving_room(one) <= one
    assert (serving_room(one) <= serving_room(other)) == (one <= other) or serving_room(one) == serving_room(
        other
    )
    cache = cache_bound(one, other)
    assert cache <= other
    assert cache <= max(one - other, LEAST_CACHE_BYTES)


@given(
    st.integers(1, 3),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from([0, 1, 2, 3]),
    st.sampled_from([8, 32]),
)
@settings(max_examples=25)
def test_states_are_of_each_element_once_however_it_is_cut(layers, shares, stage, bits):
    recipe = recipe_of(f"optimizer.state_bits={bits}", "optimizer.master_weights=none")
    plan = make_plan(llama_like(layers, 64).units, shares, stage)
    ranks = range(len(shares) if stage else 1)
    found = [state_sizes(plan, rank, state_bytes_of(recipe.optimizer)) for rank in ranks]
    elements = sum(s.size for u in plan.units for s in u.segments)
    total = sum(sum(one.values()) for one in found)
    assert all(name.startswith("optimizer") for one in found for name in one)
    if bits == 32:
        assert total == 8 * elements, "two moments in float32"
    else:
        assert 2 * elements < total < 2.5 * elements, "two codes of a byte, and a scale for each 64 of them"


@given(st.integers(1, 2**31), st.sampled_from(["", "k", "m", "kb", "K"]))
def test_what_is_sent_unasked_follows_open_mpis_limit(number, scale):
    limit = number << {"": 0, "k": 10, "m": 20}[scale.lower().rstrip("b")]
    said = {"OMPI_MCA_btl_tcp_eager_limit": f" {number}{scale}"}
    assert unasked_bytes(said) == max(limit - HEADER_BYTES, HEADER_BYTES)


@given(st.text(max_size=12))
def test_a_limit_that_is_no_number_is_the_default(text):
    found = unasked_bytes({"OMPI_MCA_btl_tcp_eager_limit": text})
    digits = text.strip().lower().rstrip("kmgb")
    if not (digits.isascii() and digits.isdigit()):
        assert found == DEFAULT_EAGER_LIMIT - HEADER_BYTES
    assert found >= HEADER_BYTES


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=5), st.integers(0, 5))
def test_ranks_agree_on_the_least_and_another_version_is_refused(limits, place):
    answers = [{UNASKED_FACT: limit} for limit in limits]
    assert agreed_unasked_bytes(answers) == min(limits)
    with pytest.raises(UserError, match="different versions"):
        agreed_unasked_bytes([*answers[:place], {"version": "0.1"}, *answers[place:]])


@given(st.lists(st.one_of(st.none(), st.floats(1e6, 1e11)), max_size=6))
def test_a_cluster_is_as_fast_as_its_slowest_link(rates):
    nodes = [node_of(f"n{n}", 1, link_bytes_per_second=rate) for n, rate in enumerate(rates)]
    known = [rate for rate in rates if rate]
    assert wire_of(nodes) == wire_of(nodes[::-1])
    assert wire_of(nodes).rate == ((min(known),) * 2 if known else WIRES[0].rate)


@given(st.floats(0, 1e7), st.floats(0, 1e7))
def test_wear_adds_up(one, other):
    assert hourly_wear(one) + hourly_wear(other) == pytest.approx(hourly_wear(one + other))
    assert hourly_wear(one) * 3 * 8766 == pytest.approx(one), "after three years nothing is left"


@given(st.tuples(*[st.integers(0, 60)] * 3))
def test_versions_are_compared_as_numbers(version):
    text = ".".join(map(str, version))
    assert linear_in(text) == linear_in(f"{text}.dev20260101+abc") == (version >= (0, 32, 4))


CONFIG = tiny_config("llama", hidden_size=256, intermediate_size=768, num_hidden_layers=3, head_dim=64)
SPEC = describe(build_model(CONFIG, "llama"), CONFIG, "llama", "float32")
LEAST = assess(recipe_of("memory.zero_stage=3", "memory.shares=equal"), SPEC, nodes_of([2**40] * 2)).plan


@given(st.tuples(*[st.floats(0.3, 3.0)] * 2))
@settings(max_examples=25)
def test_a_plan_is_refused_where_a_rank_has_too_little_and_the_worst_is_named(parts):
    limits = [int(part * one.peak) for part, one in zip(parts, LEAST.ledgers, strict=True)]
    plan, nodes = replace(LEAST, limits=tuple(limits)), nodes_of(limits)
    if all(one.peak <= limit for one, limit in zip(plan.ledgers, limits, strict=True)):
        require_fit(plan, nodes)
        return
    with pytest.raises(DoesNotFitError) as told:
        require_fit(plan, nodes, "or wait")
    worst = max((0, 1), key=lambda r: plan.ledgers[r].peak / limits[r])
    assert str(told.value).startswith(
        f"node-{worst} (rank {worst}) needs {needs_in_words(plan, worst)}; try "
    )
    assert str(told.value).endswith(", or wait")
    assert amount(plan.ledgers[worst].peak) in str(told.value)
    assert "\n" not in str(told.value)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_what_is_kept_of_a_layer_is_the_sum_of_its_products(data):
    work = replace(LEAST.work, unrecomputed=0)
    order = order_of(SPEC, work, LEAST.shards.trained, least=1)
    assert order
    unit, _ = data.draw(st.sampled_from(order))
    numbers = sorted({n for u, own in order if u == unit for n in own})
    some = set(data.draw(st.lists(st.sampled_from(numbers))))
    for measure in (kept_bytes, saved_operations):
        parts = [
            measure(SPEC.units[unit], chosen, SPEC, work)
            for chosen in (tuple(some), tuple({*numbers} - some))
        ]
        assert sum(parts) == measure(SPEC.units[unit], numbers, SPEC, work)
    worths = [
        saved_operations(SPEC.units[u], own, SPEC, work) / kept_bytes(SPEC.units[u], own, SPEC, work)
        for u, own in order
    ]
    assert all(a > 0.99 * b - 1 for a, b in pairwise(worths)), "what saves most a byte first"


@pytest.mark.parametrize("tail", [0, 2])
def test_a_ledger_grows_with_its_micro_batches_and_operations_are_those_of_the_weights(tail):
    work = replace(LEAST.work, unrecomputed=tail)
    states = state_bytes_of(recipe_of().optimizer)
    peaks = [ledger(SPEC, LEAST.shards, replace(work, micro_size=size), 0, states).peak for size in (1, 2)]
    assert peaks[0] < peaks[1]
    for unit, flops in zip(SPEC.units, unit_flops(SPEC, work), strict=True):
        elements = sum(t.parameters for t in unit.tensors)
        scores = attention_flops(SPEC, work.width) if unit is not SPEC.units[0] else 0
        assert flops.forward == 2 * elements + scores
        assert flops.gradients == 4 * elements + 2 * scores
        assert 0 <= flops.again <= flops.forward
