"""Whole units' buffers are asked for in the first step and handed out again; other weights never show through."""

from __future__ import annotations

import gc

import mlx.core as mx
import numpy as np
import pytest
from support.stepping import Case, batches_of, counted_tokens, own_batches, trainer_of, whole_weights

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine import store


@pytest.fixture
def asked(monkeypatch):
    """Sizes of the whole buffers that the store asks for, in elements."""
    sizes, real = [], store.empty_rows

    def noted(wanted):
        sizes.extend(size for size, _ in wanted)
        return real(wanted)

    monkeypatch.setattr(store, "empty_rows", noted)
    return sizes


def steps(trainer, case, count):
    for step in range(count):
        batches = batches_of(case, step)
        own = own_batches(trainer, batches, 0)
        trainer.train_step(own, counted_tokens(batches), step + 1, case.learning_rate)
        yield step


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])  # of layers alike, and of two kinds
def test_no_unit_is_allocated_after_the_first_step(asked, family):
    case = Case(family, micro_batches=2)
    with CommThread() as thread:
        trainer = trainer_of(case, SoloCommunicator("here"), thread)
        found = []
        for _ in steps(trainer, case, 3):
            found.append(len(asked))
            asked.clear()
    assert found[0] > 0
    if family == "llama":
        assert found[1:] == [0, 0]
    else:  # layers of one kind make room for those of the other: a unit of each, of two segments
        assert max(found[1:]) <= 4


def test_no_more_bytes_are_held_than_were_whole_at_once():
    spares = store._Spares()
    small, large = [(64, "float32")], [(640, "float32")]
    (one, _), (two, _) = spares.take(small), spares.take(small)
    spares.give(one)
    spares.give(two)
    big, _ = spares.take(large)  # 2,560 bytes beside which nothing has ever lain
    assert spares.take(small)[0][0].size == 64
    assert spares._free == []
    mark = mx.zeros(1)
    spares.give(big, mark)
    again, waits_for = spares.take(large)
    assert again[0] is big[0]
    assert waits_for is mark, "it is not written before what reads it is done"


def test_after_the_whole_model_was_there_nothing_is_kept(asked):
    """Inference within a run holds every unit at once; the next step takes what a step takes."""
    case = Case(micro_batches=2)
    with CommThread() as thread:
        trainer = trainer_of(case, SoloCommunicator("here"), thread)
        list(steps(trainer, case, 1))
        before = whole_weights(trainer)
        with trainer.whole_model():
            pass
        asked.clear()
        assert trainer.store._spares._free == []
        after = whole_weights(trainer)
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sgd"])
def test_no_update_keeps_the_buffer_of_its_neighbours(optimizer):
    """MLX computes in place of an input that nobody else reads, which may be a part of a larger buffer."""
    case = Case(micro_batches=2, optimizer=optimizer, state_bits=32)
    gc.collect()
    before = mx.get_active_memory()
    with CommThread() as thread:
        trainer = trainer_of(case, SoloCommunicator("here"), thread)
        list(steps(trainer, case, 2))
        gc.collect()
        chunks = [chunk for unit in trainer.store.chunks for segment in unit for chunk in segment]
        arrays = [array for chunk in chunks for array in (chunk.weights, *chunk.state.values())]
        spares = [array for buffers, _ in trainer.store._spares._free for array in buffers]
        known = sum(array.nbytes for array in (*arrays, *spares))
        assert known > 1 << 20
        assert mx.get_active_memory() - before <= known + (1 << 16)
