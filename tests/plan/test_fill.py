"""What spare memory keeps of recomputed layers: as much as fits, what saves most first, and never for nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.planning import assess, node_of, recipe_of
from support.tiny_models import tiny_config

from mlx_empire.model.build import build_model, describe
from mlx_empire.model.kept import ATTENTION
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.actions import Stash
from mlx_empire.plan.fill import Recomputation, bought, most_operations
from mlx_empire.plan.kept import kept_bytes, order_of, saved_operations
from mlx_empire.plan.memory import ledger
from mlx_empire.plan.resolve import resolve
from mlx_empire.plan.shares import TIGHT_HEADROOM
from mlx_empire.plan.step_bytes import KEPT
from mlx_empire.plan.step_time import COMPUTE, Link, step_timeline
from mlx_empire.plan.work import executed_flops, flops_per_token, step_flops

CONFIG = tiny_config(
    "llama", hidden_size=256, intermediate_size=768, num_hidden_layers=6, vocab_size=512, head_dim=64
)
SPEC = describe(build_model(CONFIG, "llama"), CONFIG, "llama", "float32")
WORDS = ("model.dtype=float32", "data.sequence_length=512", "optimizer.state_bits=32")
AUTO = (*WORDS, "memory.gradient_checkpointing=auto")


def planned(*words: str, limits: tuple[float, ...] = (1.25,), **node: object):
    """The plan where each machine may use so many times what it needs if all is recomputed and nothing kept."""
    least = plain("memory.zero_stage=3", ranks=len(limits))
    nodes = [
        replace(node_of(f"n{r}", int(limit * one.peak)), **node)
        for r, (limit, one) in enumerate(zip(limits, least, strict=True))
    ]
    return assess(recipe_of(*AUTO, "memory.zero_stage=3", "memory.shares=equal", *words), SPEC, nodes).plan


def plain(*words: str, ranks: int):
    nodes = [node_of(f"n{r}", 2**40) for r in range(ranks)]
    recipe = recipe_of(*WORDS, "memory.gradient_checkpointing=true", "memory.shares=equal", *words)
    return assess(recipe, SPEC, nodes).plan.ledgers


def test_each_rank_keeps_what_fits_and_one_more_would_not():
    plan = planned("numerics.bits=fast", limits=(1.2, 1.25))
    work, states = plan.work, state_bytes_of(recipe_of(*AUTO).optimizer)
    assert plan.comfortable
    assert work.unrecomputed < 6
    for rank, (stash, limit) in enumerate(zip(work.stashes, plan.limits, strict=True)):
        assert 0 < stash.visits < len(stash.order) * work.micro_batches(rank)
        more = replace(work, stashes=tuple(replace(s, visits=s.visits + 1) for s in work.stashes))
        assert ledger(SPEC, plan.shards, more, rank, states).peak > (1 - TIGHT_HEADROOM) * limit
    assert work.stashes[0].visits != work.stashes[1].visits


def test_with_strict_bits_all_micro_batches_keep_the_same_as_far_as_the_fullest_rank_has_room():
    plan = planned(limits=(1.2, 1.25))
    work, states = plan.work, state_bytes_of(recipe_of(*AUTO).optimizer)
    assert plan.comfortable
    (order,) = {stash.order for stash in work.stashes}
    assert [stash.visits for stash in work.stashes] == [len(order) * work.micro_batches(r) for r in (0, 1)]
    single = [(u, number) for u, numbers in order_of(SPEC, work, plan.shards.trained) for number in numbers]
    kept = {(u, number) for u, numbers in order for number in numbers}
    assert kept == set(single[: len(kept)])
    more = (*order, (single[len(kept)][0], (single[len(kept)][1],)))
    stashes = tuple(Stash(more, len(more) * work.micro_batches(r)) for r in (0, 1))
    peaks = [ledger(SPEC, plan.shards, replace(work, stashes=stashes), r, states).peak for r in (0, 1)]
    assert any(peak > (1 - TIGHT_HEADROOM) * limit for peak, limit in zip(peaks, plan.limits, strict=True))


@pytest.mark.parametrize("ranks", [1, 3])
def test_other_ranks_take_what_was_noted_while_it_fits(ranks):
    before = planned(limits=(1.2, 1.25))
    noted = Recomputation.of(before.work)
    assert noted is not None
    assert (noted.unrecomputed, noted.kept) == (before.work.unrecomputed, before.work.stashes[0].order)
    recipe = recipe_of(*AUTO, "batch.cells=2")
    roomy = [node_of(f"n{r}", 2**40) for r in range(ranks)]
    states = state_bytes_of(recipe.optimizer)
    free, bound = (resolve(recipe, SPEC, roomy, states, n).work for n in (None, noted))
    assert Recomputation.of(free) != noted
    assert Recomputation.of(bound) == noted
    busy = [r for r in range(ranks) if bound.micro_batches(r)]
    assert all(bound.stashes[r].visits == len(noted.kept) * bound.micro_batches(r) for r in busy)
    fast = recipe_of(*AUTO, "batch.cells=2", "numerics.bits=fast")
    assert resolve(fast, SPEC, roomy, states, noted).work.unrecomputed == free.unrecomputed
    every_layer = recipe_of(*WORDS, "memory.gradient_checkpointing=true")
    assert resolve(every_layer, SPEC, roomy, states, noted).work.unrecomputed == 0


def test_what_was_noted_and_does_not_fit_is_chosen_anew():
    noted = Recomputation.of(planned(limits=(2.0, 2.0)).work)
    recipe = recipe_of(*AUTO, "batch.cells=2", "memory.zero_stage=3")
    (least,) = plain("memory.zero_stage=3", "batch.cells=2", ranks=1)
    plan = resolve(
        recipe, SPEC, [node_of("n0", int(1.1 * least.peak))], state_bytes_of(recipe.optimizer), noted
    )
    assert plan.fits
    assert Recomputation.of(plan.work) != noted


def test_what_is_kept_is_the_faster_of_the_ways_to_use_the_memory():
    """Never more operations than with the longest tail alone."""
    for limit in (1.1, 1.3, 1.6, 2.0):
        kept, tail = (planned(f"memory.keep_products={word}", limits=(limit,)) for word in ("true", "false"))
        assert most_operations(SPEC, kept.shards, kept.work) <= most_operations(SPEC, tail.shards, tail.work)
        assert kept.comfortable


@pytest.mark.parametrize(
    ("words", "node", "keeps"),
    [
        ((), {}, True),
        ((), {"measured": True}, True),
        ((), {"chip": "Apple M3 Ultra"}, False),
        ((), {"role": "king", "measured": False}, False),  # a Mac of which only a hostfile is there
        (("memory.keep_products=true",), {"chip": "Apple M3 Ultra"}, True),
        ((), {"chip": "NVIDIA H200", "measured": True}, False),
        (("memory.keep_products=false",), {}, False),
        (("memory.gradient_checkpointing=true",), {}, False),
        (("memory.gradient_checkpointing=true", "memory.keep_products=true"), {}, False),
    ],
)
def test_only_auto_keeps_and_on_a_gpu_only_where_it_is_asked_for(words, node, keeps):
    plan = planned(*words, limits=(1.2,), **node)
    assert bool(plan.work.stashes) == keeps
    assert bool(bought(SPEC, plan.shards, plan.work, plan.ledgers)) == keeps


def test_the_best_product_a_byte_comes_first_and_then_the_last_layer():
    long = replace(planned().work, stashes=(), unrecomputed=0, width=1024, micro_size=1, by_pattern=True)
    order = order_of(SPEC, long, planned().shards.trained)
    unit = SPEC.units[1]

    def worth(products: tuple[int, ...]) -> float:
        return saved_operations(unit, products, SPEC, long) / kept_bytes(unit, products, SPEC, long)

    worths = [worth(products) for _, products in order]
    assert worths == sorted(worths, reverse=True)
    assert [u for u, _ in order[:6]] == [6, 5, 4, 3, 2, 1]
    # q, k, v, output, gate and up: 2 operations for each of 256 inputs, 4 bytes a result; the last product is not
    # computed again, and attention (-1) saves most in rows that are long.
    assert order[0] == (6, (-1,))
    assert order[6] == (6, (0, 1, 2, 3, 4, 5))
    assert worth(order[6][1]) == 2 * 256 / 4


def test_what_is_computed_sooner_than_python_finds_it_is_not_kept():
    work = replace(planned().work, stashes=(), unrecomputed=0, width=64)
    trained = planned().shards.trained
    kept = {number for _, numbers in order_of(SPEC, work, trained) for number in numbers}
    assert kept == {4, 5}  # gate and up: 2 x 64 x 256 x 768 operations
    assert {n for _, numbers in order_of(SPEC, work, trained, least=0) for n in numbers} == {0, 1, 2, 3, 4, 5}


def test_the_report_and_the_clock_count_what_is_not_computed_again():
    plan = planned(limits=(1.2,))
    work, bare = plan.work, replace(plan.work, stashes=())
    saved = step_flops(SPEC, plan.shards, bare, 0) - step_flops(SPEC, plan.shards, work, 0)
    micros, stash = work.micro_batches(0), work.stashes[0]
    expected, size = 0, 0
    for u, products in order_times(stash, micros):
        expected += saved_operations(SPEC.units[u], products, SPEC, work)
        size += kept_bytes(SPEC.units[u], products, SPEC, work)
    assert saved == pytest.approx(expected)
    assert max(phase.get(KEPT, 0) for phase in plan.ledgers[0].phases.values()) == size
    share = 100 * saved / step_flops(SPEC, plan.shards, bare, 0)
    assert f"{share:.1f} % fewer operations" in bought(SPEC, plan.shards, work, plan.ledgers)
    kinds = {e.what for e in timeline(plan, work).events if e.lane == COMPUTE}
    assert {"stash", "reuse"} <= kinds
    assert timeline(plan, work).seconds < timeline(plan, bare).seconds


def test_executed_operations_count_what_is_kept_by_the_width_of_the_rows():
    """Attention is kept in proportion to the width, and not in rows that are too short for blocks; products always."""
    bare = replace(planned().work, stashes=(), unrecomputed=0, width=1024, by_pattern=True)
    order, micros = order_of(SPEC, bare, planned().shards.trained), bare.micro_batches(0)
    work = replace(bare, stashes=(Stash(order, len(order) * micros - 1),))
    saved = {True: 0.0, False: 0.0}
    for u, products in order_times(work.stashes[0], micros):
        for number in products:
            one = saved_operations(SPEC.units[u], (number,), SPEC, work) / (work.tokens * micros)
            saved[number == ATTENTION] += one
    assert min(saved.values()) > 0
    for width, part in ((1024, 1.0), (512, 0.5), (256, 0.0)):
        expected = flops_per_token(SPEC, replace(bare, width=width)) - saved[False] - part * saved[True]
        assert executed_flops(SPEC, work, 8 * width, 8) == pytest.approx(8 * width * expected)


def order_times(stash: Stash, micros: int) -> list[tuple[int, tuple[int, ...]]]:
    """Every visit that is kept."""
    return [entry for entry in stash.order for _ in range(micros)][: stash.visits]


class Costs:
    """A second for each operation."""

    def compute(self, action):
        unit = SPEC.units[action.unit]
        saved = saved_operations(unit, action.products, SPEC, self.work) if action.kind == "reuse" else 0
        return (
            action.times * (1e9 - saved) if action.kind in ("forward", "stash", "backward", "reuse") else 0.0
        )

    def add(self, nbytes):
        return 0.0


def timeline(plan, work):
    costs = Costs()
    costs.work = work
    return step_timeline(plan.shards, work, [costs], Link(1e30), "direct")


RECOMPUTED_SHORT = ("memory.gradient_checkpointing=true", "data.sequence_length=16")


@pytest.mark.parametrize(
    ("words", "node", "ahead"),
    [
        ((), {}, True),
        ((), {"chip": "Apple M3 Ultra"}, False),
        (("memory.run_ahead=true",), {"chip": "Apple M3 Ultra"}, True),
        (("memory.run_ahead=false",), {}, False),
        (RECOMPUTED_SHORT, {}, False),  # the update is the peak, and grows
        ((*RECOMPUTED_SHORT, "memory.run_ahead=true"), {}, True),
    ],
)
def test_the_main_thread_runs_ahead_where_that_is_free_but_on_no_gpu_unasked(words, node, ahead):
    plan = planned("memory.run_ahead=auto", *words, limits=(16.0,), **node)
    waiting = planned("memory.run_ahead=auto", *words, "memory.run_ahead=false", limits=(16.0,), **node)
    assert plan.work.run_ahead == ahead
    if "memory.run_ahead=true" not in words:
        assert plan.ledgers[0].peak == waiting.ledgers[0].peak
