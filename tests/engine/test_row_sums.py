"""A table's gradient as the rows that were looked up is the whole table's, bit for bit, also on a stream of its own.

On a CPU the stream that computes it is the one of all else, on a Mac it is not.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.stepping import Case, batches_of, counted_tokens, gathered_gradients, own_batches, trainer_of

from mlx_empire.comm.buffers import host_view
from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine.gradients import EmbeddingSum, RowSum

VOCABULARY, WIDTH = 13, 4
micro_batches = st.lists(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9), min_size=1, max_size=4
)


def added_up(batches: list[list[int]], seed: int) -> tuple[RowSum, np.ndarray]:
    """The sum by rows, and that of whole tables added in order of micro-batches."""
    rng = np.random.default_rng(seed)
    by_row, whole = RowSum(), np.zeros((VOCABULARY, WIDTH), np.float32)
    for tokens in batches:
        rows = np.unique(tokens)
        values = rng.standard_normal((rows.size, WIDTH)).astype(np.float32)
        by_row.add(rows, values)
        table = np.zeros_like(whole)
        table[rows] = values
        whole = whole + table
    return by_row, whole


@given(micro_batches, st.integers(0, 2**32))
def test_rows_add_up_to_the_whole_table(batches, seed):
    by_row, whole = added_up(batches, seed)
    assert by_row.rows.size == len({token for tokens in batches for token in tokens})
    assert np.array_equal(host_view(by_row.whole(VOCABULARY, mx.float32)).reshape(whole.shape), whole)
    rounded = mx.array(whole).astype(mx.bfloat16)
    assert np.array_equal(host_view(by_row.whole(VOCABULARY, mx.bfloat16)), host_view(rounded))


@given(micro_batches, st.integers(0, 2**32))
def test_a_tied_matrix_gets_the_sum_of_head_and_rows(batches, seed):
    by_row, whole = added_up(batches, seed)
    head = mx.random.normal((WIDTH, VOCABULARY), key=mx.random.key(seed)).T  # as a product's gradient comes
    before = np.array(head)
    tied = by_row.added_to(head)
    assert np.array_equal(np.array(tied), before + whole)


def test_what_is_handed_over_is_added_in_its_order_and_is_there_once_asked_for():
    begun, row = Event(), np.array([5])
    with ThreadPoolExecutor(1) as adder:
        adder.submit(begun.wait)  # nothing is added while rows are handed over
        cell = EmbeddingSum()
        for value in (1.0, 1e8, -1e8, 3.0):  # in another order 1 would be left, or nothing
            values = mx.full((1, WIDTH), value)
            mx.async_eval(values)
            cell.add_rows(adder, row, values)
        assert cell.rows.rows.size == 0
        begun.set()
        cell.settle()
    assert np.array_equal(cell.rows.values, np.full((1, WIDTH), 3.0, np.float32))


class Deferring:
    """An executor that does nothing before it is waited for; the most that was ever waiting."""

    def __init__(self):
        self.most = self._waiting = 0

    def submit(self, work):
        self._waiting += 1
        self.most = max(self.most, self._waiting)
        return SimpleNamespace(result=lambda: self._done(work))

    def _done(self, work):
        self._waiting -= 1
        work()


def gradients_of(case, *, stream=None, adder=None):
    """A step's loss and gradients, with the embedding's on `stream` and added up by `adder`."""
    comm = SoloCommunicator("here")
    with CommThread() as thread:
        trainer = trainer_of(case, comm, thread)
        passes = trainer.streamed._passes
        passes.beside, passes._adder = stream or passes.beside, adder or passes._adder
        batches = batches_of(case)
        loss = trainer.compute(own_batches(trainer, batches, 0), counted_tokens(batches))
        return loss, gathered_gradients(trainer, comm)


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_on_a_stream_of_its_own_the_embedding_s_gradient_has_the_same_bits(tied, run_ahead):
    case = Case(cells=2, tied=tied, run_ahead=run_ahead)
    loss, expected = gradients_of(case)
    own, found = gradients_of(case, stream=mx.new_stream(mx.cpu))
    assert own == loss
    assert {name for name, array in expected.items() if not np.array_equal(found[name], array)} == set()


@pytest.mark.parametrize("tail", [0, 4])  # beside the lowest layer's backward, and after all of it
def test_one_micro_batch_s_embedding_is_in_flight_at_a_time(tail):
    """So the ledger counts one, however many cells there are."""
    case, adder = Case(cells=2, run_ahead=True, tail=tail), Deferring()
    _, found = gradients_of(case, adder=adder)
    assert adder.most == 1
    _, expected = gradients_of(case)
    assert all(np.array_equal(found[name], array) for name, array in expected.items())
