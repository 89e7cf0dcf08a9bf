"""Which pairs of machines are measured at the same time, and what their speeds say of each machine."""

from __future__ import annotations

import itertools

import pytest

from mlx_empire.doctor.link_worker import rounds
from mlx_empire.doctor.links import rates_of_hosts


@pytest.mark.parametrize("size", range(1, 10))
def test_every_pair_is_measured_once_and_no_machine_twice_in_a_round(size: int) -> None:
    found = rounds(size)
    assert sorted(pair for one in found for pair in one) == list(itertools.combinations(range(size), 2))
    assert all(len({rank for pair in one for rank in pair}) == 2 * len(one) for one in found)
    assert len(found) <= size


def test_behind_a_switch_each_machine_is_worth_its_own_card() -> None:
    cards = [9.0, 3.0, 1.0, 6.0]
    pairs = {(a, b): min(cards[a], cards[b]) for a, b in itertools.combinations(range(4), 2)}
    assert rates_of_hosts(pairs, 4) == [6.0, 3.0, 1.0, 6.0]  # nobody is faster than the first machine's 6


def test_where_one_cable_is_slow_both_its_ends_are_worth_that() -> None:
    pairs = {(0, 1): 5.0, (0, 2): 5.0, (1, 2): 1.0}
    assert rates_of_hosts(pairs, 3) == [5.0, 1.0, 1.0]
