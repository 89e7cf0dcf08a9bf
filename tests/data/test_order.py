"""The order of examples: a permutation per epoch, the same wherever it is computed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_empire.data.order import Shuffled, epoch_order


def philox_4x64(counter: int, key: tuple[int, int]) -> list[int]:
    """One block of Philox-4x64-10, from the paper (Salmon et al., SC 2011), in Python integers."""
    word = 2**64
    x = [counter % word, counter // word, 0, 0]
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * x[0], word)
        high1, low1 = divmod(0xCA5A826395121157 * x[2], word)
        x = [high1 ^ x[1] ^ k0, low1, high0 ^ x[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % word, (k1 + 0xBB67AE8584CAA73B) % word
    return x


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (1234, 7), (2**64 - 1, 3)])
def test_the_order_sorts_a_philox_stream_written_from_the_paper(seed, epoch):
    stream = [word for block in range(1, 26) for word in philox_4x64(block, (seed, epoch))]
    assert epoch_order(100, seed, epoch).tolist() == sorted(range(100), key=lambda i: stream[i])


@given(rows=st.integers(1, 200), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_an_epoch_is_a_permutation(rows, seed, epoch):
    assert sorted(epoch_order(rows, seed, epoch).tolist()) == list(range(rows))


def test_epochs_and_seeds_differ():
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


@given(rows=st.integers(1, 20), seed=st.integers(0, 99), first=st.integers(0, 100), count=st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_positions_run_through_the_epochs(rows, seed, first, count):
    endless = np.concatenate([epoch_order(rows, seed, e) for e in range((first + count) // rows + 1)])
    assert Shuffled(rows, seed).rows_at(first, count).tolist() == endless[first : first + count].tolist()


def test_no_source_reads_its_rows_in_the_order_of_another_ones_epoch():
    orders = [tuple(epoch_order(50, 3, epoch, source)) for source in range(3) for epoch in range(3)]
    assert len(set(orders)) == len(orders)
