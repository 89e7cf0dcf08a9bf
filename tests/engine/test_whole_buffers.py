"""Buffers of a unit's size are asked for in the first step and handed out again; what they held never shows through."""

from __future__ import annotations

import gc
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from support.stepping import (
    Case,
    batches_of,
    counted_tokens,
    digest,
    optimizer_of,
    own_batches,
    trainer_of,
    whole_weights,
)

from mlx_empire.comm.buffers import host_view
from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine import spares
from mlx_empire.engine.gradients import GradientStore
from mlx_empire.optim.compile import may_compile
from mlx_empire.plan.memory import ledger
from mlx_empire.plan.schedule import folded_step
from mlx_empire.plan.step_bytes import StepBytes

EVERYTHING = 1 << 40  # bytes
BFLOAT16 = {"dtype": "bfloat16", "gradient_dtype": "bfloat16"}
fuses = pytest.mark.skipif(not may_compile(), reason="without a compiler MLX rounds into memory of its own")


@pytest.fixture
def asked(monkeypatch):
    """Sizes of the large buffers that are asked for, in elements."""
    sizes, real = [], spares.empty_rows

    def noted(wanted, *how):
        sizes.extend(size for size, _ in wanted)
        return real(wanted, *how)

    monkeypatch.setattr(spares, "empty_rows", noted)
    return sizes


def steps(trainer, case, count):
    for step in range(count):
        batches = batches_of(case, step)
        own = own_batches(trainer, batches, 0)
        trainer.train_step(own, counted_tokens(batches), step + 1, case.learning_rate)
        yield step


def asked_by_step(asked, case, kept, count=3):
    """How many buffers are asked for in each of so many steps, with `kept` bytes for totals, and the weights after."""
    with CommThread() as thread:
        trainer = trainer_of(case, SoloCommunicator("here"), thread)
        trainer.gradients.reuse(kept)
        found = []
        for _ in steps(trainer, case, count):
            found.append(len(asked))
            asked.clear()
        return found, digest(whole_weights(trainer))


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])  # of layers alike, and of two kinds
def test_no_unit_is_allocated_after_the_first_step(asked, family):
    found, _ = asked_by_step(asked, Case(family, micro_batches=2), EVERYTHING)
    assert found[0] > 0
    if family == "llama":
        assert found[1:] == [0, 0]
    else:  # layers of one kind make room for those of the other: a unit of each, of two segments
        assert max(found[1:]) <= 4


KINDS = {
    "stage 2": {"stage": 2},
    "stage 3, two rounds": {"cells": 2},
    "running ahead": {"run_ahead": True},
    "stage 1, bfloat16": {"stage": 1, **BFLOAT16, "state_bits": 8},
    "in the backward": {"stage": 2, "release": True},
    "stage 3, lion": {"optimizer": "lion", "state_bits": 8},
    "stage 0, sgd": {"stage": 0, "optimizer": "sgd", "micro_batches": 1},
    "running ahead in bfloat16": {"run_ahead": True, **BFLOAT16},
}


@pytest.mark.parametrize("kind", KINDS)
def test_totals_that_are_handed_out_again_leave_the_bits_as_they_are(asked, kind):
    case = Case("llama", **{"micro_batches": 2, "learning_rate": 1e-2, **KINDS[kind]})
    kept, bits = asked_by_step(asked, case, EVERYTHING)
    assert kept[1:] == [0, 0]
    anew, same = asked_by_step(asked, case, 0)
    assert min(anew[1:]) > 0, "without room they are asked for in every step"
    assert bits == same


def test_totals_are_kept_as_far_as_the_plan_has_room(asked):
    """A model whose head is the peak has none beside it; one of many small layers has room for most."""
    deep = {"num_hidden_layers": 12, "vocab_size": 256}
    case = Case("llama", micro_batches=1, rows=1, width=16, stage=2, config=deep)
    with CommThread() as thread:
        trainer = trainer_of(case, SoloCommunicator("here"), thread)
    work, states = trainer.work, optimizer_of(case).state_bytes
    one = ledger(trainer.spec, trainer.store.plan, work, 0, states)
    found, _ = asked_by_step(asked, case, one.spare)
    assert 0 < found[1] == found[2] < found[0]
    played = StepBytes(trainer.spec, trainer.store.plan, work, 0, states)
    held = moments_of(played)
    assert one.spare == min(one.peak - sum(one.resident.values()) - others for others, _ in held)
    assert max(others + max(totals, one.spare) for others, totals in held) == max(map(sum, held))
    wide = ledger(trainer.spec, trainer.store.plan, replace(work, width=4096), 0, states)
    assert wide.spare < one.spare


@fuses
@pytest.mark.parametrize("kind", ["bfloat16", "stage 1, bfloat16", "running ahead in bfloat16"])
def test_totals_in_bfloat16_lie_in_the_memory_of_the_last_step(monkeypatch, kind):
    """What MLX rounds into memory of its own would be asked for anew: places are compared, not calls."""
    case = Case("llama", **{"micro_batches": 2, **BFLOAT16, **KINDS.get(kind, {})})
    places, real = [set()], GradientStore.drop

    def noted(sums, index):
        places[-1] |= {place_of(total) for total in sums.totals[index]}
        real(sums, index)

    monkeypatch.setattr(GradientStore, "drop", noted)
    with CommThread() as thread:
        trainer = trainer_of(case, SoloCommunicator("here"), thread)
        trainer.gradients.reuse(EVERYTHING)
        for _ in steps(trainer, case, 3):
            places.append(set())
    first, second, third, _ = places
    assert len(first) >= 2 * 5
    assert first == second == third


@fuses
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_rounding_takes_the_memory_that_it_is_given(rows):
    wide = np.random.default_rng(rows).normal(size=(rows, 64)).astype(np.float32)
    wide[0, :6] = np.nan, np.inf, -np.inf, 3.4e38, 1e-40, -0.0
    given = [mx.full((rows, 64), np.nan, mx.bfloat16), mx.zeros((2, 64), mx.bfloat16)]
    mx.eval(given)
    places = [place_of(array) for array in given]
    rounded = spares.rounded_into(given, [mx.array(wide), mx.ones((2, 64))])
    assert given == []
    assert [place_of(array) for array in rounded] == places
    assert bits_of(rounded[0]) == bits_of(mx.array(wide).astype(mx.bfloat16))
    assert bits_of(rounded[1]) == bits_of(mx.ones((2, 64), mx.bfloat16))


def test_no_kernel_rounds_an_array_without_elements(monkeypatch):
    """A GPU cannot start a fused one on nothing, and a rank's interval may be empty."""
    seen, real = [], spares._rounded

    def noted(wide, into):
        seen.append(wide.size)
        return real(wide, into)

    monkeypatch.setattr(spares, "_rounded", noted)
    wide = [mx.ones((rows, 64)) for rows in (0, 2, 0)]
    given = [mx.zeros(array.shape, mx.bfloat16) for array in wide]
    rounded = spares.rounded_into(given, wide)
    assert seen == [2 * 64]
    assert given == []
    assert [(array.shape, array.dtype) for array in rounded] == [(array.shape, mx.bfloat16) for array in wide]
    assert bits_of(rounded[1]) == bits_of(mx.ones((2, 64), mx.bfloat16))


def test_rounding_leaves_memory_alone_that_somebody_else_holds():
    held = mx.full((4, 64), 7.0, mx.bfloat16)
    mx.eval(held)
    (rounded,) = spares.rounded_into([held], [mx.ones((4, 64))])
    assert place_of(rounded) != place_of(held)
    assert bits_of(held) == bits_of(mx.full((4, 64), 7.0, mx.bfloat16))
    assert bits_of(rounded) == bits_of(mx.ones((4, 64), mx.bfloat16))


def place_of(array):
    return host_view(array).__array_interface__["data"][0]


def bits_of(array):
    return host_view(array).tobytes()


def moments_of(played):
    """(bytes of all else, of totals) at each moment of a step."""
    moments, noted = [], played._moment

    def moment(now, phase=None):
        totals = played._held.get("gradients", 0)
        moments.append((played._total - totals + sum(now.values()), totals))
        noted(now, phase)

    played._moment = moment
    played.play(folded_step(played.shape))
    return moments


def test_no_more_bytes_are_held_than_were_whole_at_once():
    pool = spares.Spares()
    small, large = [(64, "float32")], [(640, "float32")]
    (one, _), (two, _) = pool.take(small), pool.take(small)
    pool.give(one)
    pool.give(two)
    big, _ = pool.take(large)  # 2,560 bytes beside which nothing has ever lain
    assert pool.take(small)[0][0].size == 64
    assert pool._free == []
    mark = mx.zeros(1)
    pool.give(big, mark)
    again, waits_for = pool.take(large)
    assert again[0] is big[0]
    assert waits_for is mark, "it is not written before what reads it is done"


def test_no_more_bytes_are_kept_than_are_allowed():
    pool, small = spares.Spares(512), [(64, "float32")]  # 256 bytes each
    taken = [pool.take(small)[0] for _ in range(3)]
    pool.give(taken[0])
    assert pool._free == [], "two are in use: that is all"
    pool.give(taken[1])
    assert [buffers for buffers, _ in pool._free] == [taken[1]]
    larger, _ = pool.take([(128, "bfloat16")])  # beside it and the one in use there is no room
    assert pool._free == []
    pool.give(larger)
    pool.give(taken[2])
    assert len(pool._free) == 2
    pool.drop()
    assert pool._free == []


def test_after_the_whole_model_was_there_nothing_is_kept(asked):
    """Inference within a run holds every unit at once; the next step takes what a step takes."""
    case = Case(micro_batches=2)
    with CommThread() as thread:
        trainer = trainer_of(case, SoloCommunicator("here"), thread)
        trainer.gradients.reuse(EVERYTHING)
        list(steps(trainer, case, 1))
        before = whole_weights(trainer)
        assert trainer.gradients._spares._free
        with trainer.whole_model():
            assert trainer.gradients._spares._free == []
        asked.clear()
        assert trainer.store._spares._free == []
        after = whole_weights(trainer)
    assert all(np.array_equal(before[name], after[name]) for name in before)


# Matrices that are updated together, and such as are updated one by one.
@pytest.mark.parametrize("sizes", [{}, {"intermediate_size": 4608, "num_hidden_layers": 2}])
@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sgd"])
def test_no_update_keeps_the_buffer_of_its_neighbours(optimizer, sizes):
    """MLX computes in place of an input that nobody else reads, which may be a part of a larger buffer."""
    case = Case(micro_batches=2, optimizer=optimizer, state_bits=32, config=sizes)
    gc.collect()
    before = mx.get_active_memory()
    with CommThread() as thread:
        trainer = trainer_of(case, SoloCommunicator("here"), thread)
        list(steps(trainer, case, 2))
        gc.collect()
        chunks = [chunk for unit in trainer.store.chunks for segment in unit for chunk in segment]
        arrays = [array for chunk in chunks for array in (chunk.weights, *chunk.state.values())]
        free = [array for buffers, _ in trainer.store._spares._free for array in buffers]
        known = sum(array.nbytes for array in (*arrays, *free))
        assert known > 1 << 20
        assert mx.get_active_memory() - before <= known + (1 << 16)
