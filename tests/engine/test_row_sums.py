"""A table's gradient as the rows that were looked up is the whole table's, bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import mlx.core as mx
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mlx_empire.comm.buffers import host_view
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
