"""The list of a step's actions: properties that hold for every model, stage and number of ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.planning import llama_like

from mlx_empire.optim.adamw import AdamW
from mlx_empire.plan.actions import ALL_UNITS, Action, Stash, StepShape
from mlx_empire.plan.offload import file_places, visits
from mlx_empire.plan.schedule import evaluation, gradients, training_step
from mlx_empire.plan.shards import make_plan
from mlx_empire.plan.step_bytes import StepBytes
from mlx_empire.plan.workload import CellLayout, Workload

COLLECTIVES = {"gather", "reduce", "replicate", "renew", "norm"}


@st.composite
def ranked_shapes(draw: st.DrawFn) -> list[StepShape]:
    """One step on some ranks: the shape of each rank's part."""
    layers, ranks = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    trained = draw(st.lists(st.booleans(), min_size=layers + 1, max_size=layers + 1).filter(any))
    if draw(st.booleans()):
        trained = [True] * (layers + 1)
    elif not trained[0]:  # adapters train in the last layers
        lowest = trained.index(True)
        trained = [u >= lowest for u in range(layers + 1)]
    micro_batches = draw(st.integers(1, 12))
    layout = CellLayout(micro_batches, draw(st.integers(1, micro_batches)), ranks)
    stage, tail, release = (
        draw(st.integers(0, 3)),
        draw(st.integers(0, layers)),
        draw(st.booleans()),
    )
    embeds, offload = draw(st.booleans()), draw(st.booleans())
    order = draw(st.permutations([(u, own) for u in range(1, layers + 1) for own in ((0, 2), (1,))]))
    wave = draw(st.integers(0, 4)) if stage in (0, 2) or (ranks, stage) == (1, 3) else 0
    shapes = []
    for r in range(ranks):
        cells = tuple(map(len, layout.of_rank(r)))
        # In waves all micro-batches keep the same.
        visits = len(order) * sum(cells) if wave else draw(st.integers(0, len(order) * sum(cells)))
        visits *= not wave or draw(st.booleans())
        shapes.append(
            StepShape(
                stage,
                tuple(trained),
                cells,
                tail,
                release,
                stash=Stash(tuple(order), visits),
                wave=wave,
                embeds=embeds,
                offload=offload,
            )
        )
    return shapes


def counts(actions: Iterator[Action]) -> Counter[tuple[str, int]]:
    """How often each kind comes for each unit."""
    found: Counter[tuple[str, int]] = Counter()
    for action in actions:
        found[action.kind, action.unit] += action.times
        for product in action.products:
            found[f"{action.kind} {product}", action.unit] += action.times
    return found


@given(ranked_shapes())
@settings(max_examples=150)
def test_every_rank_has_the_same_collectives_in_the_same_order(shapes):
    orders = [
        [(a.kind, a.unit, a.round) for a in training_step(shape) if a.kind in COLLECTIVES] for shape in shapes
    ]
    assert all(order == orders[0] for order in orders)


@given(ranked_shapes())
@settings(max_examples=150)
def test_every_micro_batch_passes_every_layer_once_and_every_gradient_is_reduced_and_applied_once(shapes):
    for shape in shapes:
        found, micros = counts(training_step(shape)), shape.micro_batches
        for u in range(1, shape.layers + 1):
            recomputed = shape.lowest <= u <= shape.boundary
            assert found["forward", u] + found["stash", u] == micros * (u <= shape.boundary)
            assert found["backward", u] + found["reuse", u] == micros * recomputed
        assert found["head", 0] == found["capture", 0] == micros
        for u, trains in enumerate(shape.trained):
            assert found["reduce", u] == found["settle", u] == len(shape.cells) * trains
            assert found["keep", u] == found["reduce", u] * (shape.zero_stage == 1)
            assert found["replicate", u] == (trains and shape.zero_stage == 0)
            assert found["update", u] == trains
            assert found["renew", u] == found["adopt", u] == (trains and shape.zero_stage < 3)
        assert found["norm", ALL_UNITS] == (not shape.in_backward)


@given(ranked_shapes())
@settings(max_examples=150)
def test_the_first_visits_of_the_order_are_kept_and_found_again_in_recomputed_layers_alone(shapes):
    for shape in shapes:
        micros = range(shape.micro_batches)
        visits = [(u, m, own) for u, own in shape.stash.order for m in micros][: shape.stash.visits]
        expected = {(u, m, p) for u, m, own in visits if shape.lowest <= u <= shape.boundary for p in own}
        actions = list(training_step(shape))
        for kind in ("stash", "reuse"):
            told = [(a.unit, a.micro, p) for a in actions if a.kind == kind for p in a.products]
            assert len(told) == len(expected)
            assert set(told) == expected
        assert all(a.products for a in actions if a.kind in ("stash", "reuse"))
        assert not any(a.products for a in actions if a.kind in ("forward", "backward"))
        assert shape.stash.arrays(shape.micro_batches) == sum(len(own) for _, _, own in visits)
        assert {a.kind for a in evaluation(shape)}.isdisjoint({"stash", "reuse"})


@given(ranked_shapes())
@settings(max_examples=150)
def test_the_embeddings_gradient_is_computed_beside_the_next_backward_and_before_the_roots_sum(shapes):
    for shape in shapes:
        actions = list(training_step(shape))
        embeds = [a for a in actions if a.kind == "embed"]
        assert [a.micro for a in embeds] == list(range(shape.micro_batches)) * (
            shape.trained[0] and shape.embeds
        )
        if shape.lowest <= shape.boundary and shape.embeds:
            before = [one for one, after in pairwise(actions) if after.kind == "embed"]
            assert all((a.kind in ("backward", "reuse")) and a.unit == shape.lowest for a in before)
            assert [(a.micro, a.round) for a in before] == [(a.micro, a.round) for a in embeds]
        for r in range(len(shape.cells) * shape.trained[0]):
            sums = next(
                i
                for i, a in enumerate(actions)
                if a.kind in ("keep", "reduce") and (a.unit, a.round) == (0, r)
            )
            assert not [a for a in actions[sums:] if a.kind == "embed" and a.round == r]


@given(ranked_shapes())
@settings(max_examples=150)
def test_the_backward_reaches_the_lowest_layer_that_trains_and_the_first_below_a_trained_embedding(shapes):
    for shape in shapes:
        found = {a.unit for a in training_step(shape) if a.kind in ("backward", "reuse")}
        layers = [u for u in range(1, shape.layers + 1) if shape.trained[u]]
        lowest = 1 if shape.trained[0] and shape.embeds else min(layers, default=shape.layers + 1)
        assert found == (set(range(lowest, shape.boundary + 1)) if shape.micro_batches else set())
        assert shape.reached == shape.layers + 1 - lowest


@given(ranked_shapes())
@settings(max_examples=150)
def test_a_unit_is_whole_when_it_is_used_and_few_are_at_once(shapes):
    shape = shapes[0]
    for actions in (training_step(shape), evaluation(shape)):
        whole, bound, most = set(), set(), 0
        for action in actions:
            u = action.unit
            if action.kind == "gather":
                assert shape.sharded
                assert u not in whole
                whole.add(u)
            elif action.kind == "bind":
                assert u in whole or not shape.sharded
                bound.add(u)
            elif action.kind == "free":
                assert u in bound
                bound.discard(u)
                whole.discard(u)
            elif action.kind in ("forward", "stash", "backward", "reuse"):
                assert {0, u} <= bound
            elif action.kind == "head":
                assert {0, *range(shape.boundary + 1, shape.layers + 1)} <= bound
            most = max(most, len(whole - {0}))
        assert not whole
        assert not bound
        assert most <= max(2, shape.unrecomputed + 1)


@given(ranked_shapes())
@settings(max_examples=150)
def test_one_reduction_is_in_flight_and_a_unit_is_updated_when_its_totals_are_complete(shapes):
    shape = shapes[-1]
    in_flight, complete, normed = None, set(), False
    for action in training_step(shape):
        place = action.unit, action.round
        if action.kind == "reduce":
            assert in_flight is None
            in_flight = place
        elif action.kind == "settle":
            assert in_flight == place
            in_flight = None
            if action.round == shape.last_round:
                complete.add(action.unit)
        elif action.kind == "norm":
            normed = normed or action.unit == ALL_UNITS
            assert action.unit in complete or shape.trained.count(True) == len(complete)
        elif action.kind == "update":
            assert action.unit in complete
            assert normed != shape.in_backward
    assert in_flight is None


@given(ranked_shapes())
@example([StepShape(1, (False, False, False, True), (1, 1, 1, 0), offload=True)])  # alike rounds come last
@settings(max_examples=150)
def test_a_folded_step_counts_the_same_and_gradients_alone_are_its_beginning(shapes):
    for shape in shapes:
        for fold in ("micro-batches", "rounds"):
            assert counts(training_step(shape, fold=fold)) == counts(training_step(shape))
        plain = [a.kind for a in gradients(shape) if a.kind not in ("norm", "update", "renew", "adopt")]
        assert plain == [
            a.kind for a in training_step(shape) if a.kind not in ("norm", "update", "renew", "adopt")
        ]


@given(ranked_shapes())
@settings(max_examples=150)
def test_in_waves_no_more_pass_together_and_cells_follow_one_another(shapes):
    for shape in shapes:
        inside: set[int] = set()
        passed: list[int] = []
        rounds = []
        for action in training_step(shape):
            if action.micro >= 0 and shape.wave:
                inside.add(action.micro)
                assert len(inside) <= shape.wave
                if action.kind == "head":
                    rounds.append(action.round)
            if (action.kind, action.unit) == ("free", 0):
                passed += sorted(inside)
                inside.clear()
        assert rounds == sorted(rounds)
        if shape.wave:
            assert passed == list(range(shape.micro_batches))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_waves_that_are_left_out_of_a_ledger_do_not_matter(stage, dtype):
    spec = llama_like(layers=3, dtype=dtype)
    for wave, tail, micros, cells, offload in (
        (1, 0, 9, 2, False),
        (2, 2, 14, 1, False),
        (2, 0, 14, 1, True),
        (3, 3, 20, 4, False),
        (5, 0, 11, 1, True),
    ):
        layout = CellLayout(micros, cells, 1)
        work = Workload(1, 64, layout, tail, dtype, "auto", 4096, wave=wave, offload=offload)
        plan = make_plan(spec.units, [1], stage)
        every, few = (StepBytes(spec, plan, work, 0, AdamW().state_bytes) for _ in range(2))
        every.play(training_step(every.shape))
        few.play(training_step(few.shape, fold="peak"))
        assert few.phases == every.phases
        assert few.spare == every.spare
        together = StepBytes(spec, plan, replace(work, wave=0), 0, AdamW().state_bytes)
        together.play(training_step(together.shape, fold="peak"))
        inputs = [one.phases["backward" if tail < 3 else "head"]["layer inputs"] for one in (few, together)]
        assert inputs[0] < inputs[1]


@given(ranked_shapes())
@settings(max_examples=150)
def test_inputs_of_recomputed_layers_are_written_once_and_come_back_before_their_backward(shapes):
    """One is written at a time, beside its own forward; in the backward one is used while the next one is read."""
    for shape in shapes:
        written, reading, here, current = [], [], [], None
        for action in training_step(shape):
            place = action.unit, action.micro
            match action.kind:
                case "offload":
                    assert current is None
                    current = place
                case "forward" | "stash" if action.unit in shape.offloaded:
                    assert current == place
                case "evict":
                    assert current == place
                    current = None
                    written.append(place)
                case "prefetch":
                    assert place in written
                    reading.append(place)
                    assert len(reading) == 1
                case "fetch":
                    reading.remove(place)
                    here.append(place)
                case "backward" | "reuse" if shape.offload:
                    assert here == [place]
                    here = []
        expected = {(u, m) for u in shape.offloaded for m in range(shape.micro_batches)}
        assert len(written) == len(expected) == visits(shape)
        assert set(written) == expected
        assert (reading, here, current) == ([], [], None)
        recomputed = range(shape.lowest, shape.boundary + 1) if shape.offload else ()
        assert list(shape.offloaded) == list(recomputed)


@given(ranked_shapes())
@settings(max_examples=150)
def test_but_for_that_a_step_is_the_same_and_the_file_has_as_many_places_as_it_needs(shapes):
    disks = ("offload", "evict", "prefetch", "fetch")
    for shape in shapes:
        actions = list(training_step(shape))
        kept = training_step(replace(shape, offload=False))
        assert [a for a in actions if a.kind not in disks] == list(kept)
        assert not [a for a in evaluation(shape) if a.kind in disks]
        held = most = 0
        for action in actions:
            held += (action.kind == "offload") - (action.kind == "fetch")
            most = max(most, held)
        assert most == file_places(shape)


def test_many_micro_batches_and_rounds_are_folded():
    few, many = (
        StepShape(2, (True,) * 49, (micros,) * rounds, 2, wave=3) for micros, rounds in ((10, 3), (400, 300))
    )
    assert len(list(training_step(many, fold="peak"))) == len(list(training_step(few, fold="peak")))
    few, many = (StepShape(3, (True,) * 49, (micros,) * rounds, 2) for micros, rounds in ((4, 3), (400, 300)))
    assert len(list(training_step(many, fold="rounds"))) == len(list(training_step(few, fold="rounds")))
