"""Byte counts of the collectives against counting every element's journey one by one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_empire.plan.traffic import (
    all_gather_bytes,
    card_bytes,
    interval_sizes,
    reduce_scatter_bytes,
    resolve_route,
    scatter_bytes,
    staging_bytes,
)

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=6)
ITEMSIZES = st.sampled_from([1, 2, 4])


def edges_of(sizes: list[int]) -> list[int]:
    return [sum(sizes[:rank]) for rank in range(len(sizes) + 1)]


@given(SIZES, ITEMSIZES)
def test_direct_gather_sends_every_element_to_every_other_rank(sizes: list[int], itemsize: int) -> None:
    ranks = range(len(sizes))
    counted = [[0] * len(sizes) for _ in ranks]
    for owner in ranks:
        for _ in range(sizes[owner]):
            for to in ranks:
                counted[owner][to] += itemsize if to != owner else 0
    assert all_gather_bytes(edges_of(sizes), itemsize, "direct") == counted


@given(SIZES, ITEMSIZES)
def test_relayed_gather_sends_every_element_once_around_the_ring(sizes: list[int], itemsize: int) -> None:
    size = len(sizes)
    counted = [[0] * size for _ in range(size)]
    for owner in range(size):
        for _ in range(sizes[owner]):
            for step in range(size - 1):
                counted[(owner + step) % size][(owner + step + 1) % size] += itemsize
    edges = edges_of(sizes)
    assert all_gather_bytes(edges, itemsize, "relay") == counted
    assert all(max(card) <= edges[-1] * itemsize for card in card_bytes(counted))


@given(SIZES, ITEMSIZES, st.sampled_from(["direct", "relay", "auto"]))
def test_after_a_gather_every_rank_received_what_it_does_not_own(sizes, itemsize, route) -> None:
    received = [card[1] for card in card_bytes(all_gather_bytes(edges_of(sizes), itemsize, route))]
    assert received == [(sum(sizes) - own) * itemsize for own in sizes]


@given(SIZES, ITEMSIZES, st.data())
def test_reduce_scatter_receives_the_own_interval_from_each_contributor(sizes, itemsize, data) -> None:
    contributes = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    cards = card_bytes(reduce_scatter_bytes(edges_of(sizes), itemsize, contributes))
    for rank, (sent, received) in enumerate(cards):
        others = sum(flag for peer, flag in enumerate(contributes) if peer != rank)
        assert received == others * sizes[rank] * itemsize
        assert sent == (sum(sizes) - sizes[rank]) * itemsize * contributes[rank]


@given(SIZES, ITEMSIZES, st.data())
def test_scatter_sends_from_the_root_only(sizes, itemsize, data) -> None:
    root = data.draw(st.integers(0, len(sizes) - 1))
    cards = card_bytes(scatter_bytes(edges_of(sizes), itemsize, root))
    assert cards[root] == ((sum(sizes) - sizes[root]) * itemsize, 0)
    assert all(
        card == (0, size * itemsize) for rank, (card, size) in enumerate(zip(cards, sizes, strict=True))
        if rank != root
    )  # fmt: skip


@pytest.mark.parametrize(
    ("route", "edges", "resolved"),
    [
        ("auto", [0, 7], "direct"),
        ("auto", [0, 3, 7], "direct"),
        ("auto", [0, 3, 6, 9], "direct"),
        ("auto", [0, 5, 7, 9], "relay"),
        ("direct", [0, 5, 7, 9], "direct"),
        ("relay", [0, 3, 7], "relay"),
    ],
)
def test_auto_relays_unequal_intervals_of_more_than_two(route, edges, resolved) -> None:
    assert resolve_route(route, edges) == resolved


def test_a_king_with_042_of_the_whole() -> None:
    """The case for relaying: 1.26 x the whole over one card if sent directly."""
    edges = [0, 42, 61, 80, 100]
    assert card_bytes(all_gather_bytes(edges, 1, "direct"))[0][0] == 126
    assert max(card_bytes(all_gather_bytes(edges, 1, "relay"))[0]) == 81


@pytest.mark.parametrize("edges", [[0], [1, 2], [0, 2, 1], [], [3, 0]])
def test_edges_that_are_no_edges(edges: list[int]) -> None:
    with pytest.raises(ValueError, match="edges must"):
        interval_sizes(edges)


def test_staging_is_two_messages_per_peer_and_direction_at_most() -> None:
    assert staging_bytes([0, 1000], 2, 0, 64) == 0
    assert staging_bytes([0, 1000, 2000, 3000], 4, 1, 400) == 2 * 2 * 400 + 2 * 2 * 400
    assert staging_bytes([0, 10, 2000, 2000], 4, 0, 400) == 2 * 40 + 2 * 400
