"""Placements of a federation against what must hold of any, and against counting by hand."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_empire.plan.federation import (
    Federation,
    Member,
    ModelHost,
    adapters_held,
    federate,
    fitting_models,
    link_seconds,
    needs,
    swap_seconds,
)

DISK, LINK = (3e9, 6e9), (1.1e9, 1.1e9)
BASES = {"a": 7, "b": 20}


def place(name: str, room: int) -> ModelHost:
    return ModelHost(name, room, DISK, LINK)


@st.composite
def federations(draw: st.DrawFn) -> tuple[list[Member], list[ModelHost]]:
    rooms = draw(st.lists(st.integers(0, 60), min_size=1, max_size=6))
    rows = draw(
        st.lists(
            st.tuples(
                st.integers(1, 40),
                st.integers(0, 5),
                st.sampled_from([None, None, "a", "b"]),
                st.floats(0.1, 10),
                st.booleans(),
            ),
            max_size=12,
        )
    )
    members = [
        Member(f"m{i}", own, cache, base, weight, hot)
        for i, (own, cache, base, weight, hot) in enumerate(rows)
    ]
    return members, [place(f"p{i}", room) for i, room in enumerate(rooms)]


def memory_by_hand(found: Federation) -> dict[str, int]:
    """Bytes in memory by machine: every model's own and cache, every base once."""
    sizes: dict[str, int] = defaultdict(int)
    based: dict[str, set[str]] = defaultdict(set)
    for home in found.homes:
        if home.node is not None:
            sizes[home.node] += home.member.own + home.member.cache
            based[home.node] |= {home.member.base} if home.member.base else set()
    return {name: size + sum(BASES[base] for base in based[name]) for name, size in sizes.items()}


@given(federations())
def test_no_memory_is_overfilled_and_everyone_has_one_home(
    asked: tuple[list[Member], list[ModelHost]],
) -> None:
    members, places = asked
    found = federate(members, places, BASES)
    assert [home.member for home in found.homes] == members
    by_hand = memory_by_hand(found)
    for one in places:
        assert found.used[one.name] == by_hand.get(one.name, 0) <= one.room
    for home in found.homes:
        able = [one.name for one in places if needs(home.member, BASES) <= one.room]
        assert (home.disk is None) == (not able)
        assert home.node is None or (home.member.hot and home.disk == home.node)
        if home.disk is not None:
            assert (home.backup is None) == (len(able) < 2)
            assert home.backup != home.disk
            assert home.backup is None or home.backup in able


@given(federations())
def test_a_hot_model_is_without_memory_only_where_none_had_room(
    asked: tuple[list[Member], list[ModelHost]],
) -> None:
    members, places = asked
    found = federate(members, places, BASES)
    for name in found.hot_without_room:
        member = next(m for m in members if m.name == name)
        assert all(found.used[one.name] + needs(member, BASES) > one.room for one in places)


@given(federations())
def test_disks_hold_each_model_and_its_backup_once(asked: tuple[list[Member], list[ModelHost]]) -> None:
    members, places = asked
    found = federate(members, places, BASES)
    for one in places:
        here = [home.member for home in found.homes if one.name in (home.disk, home.backup)]
        bases = {member.base for member in here if member.base}
        assert found.stored[one.name] == sum(m.own for m in here) + sum(BASES[base] for base in bases)


@given(federations(), st.integers(0, 60))
def test_another_machine_never_makes_a_model_homeless(
    asked: tuple[list[Member], list[ModelHost]], room: int
) -> None:
    members, places = asked
    before = federate(members, places, BASES)
    after = federate(members, [*places, place("new", room)], BASES)
    for old, new in zip(before.homes, after.homes, strict=True):
        assert old.disk is None or new.disk is not None
        assert old.backup is None or new.backup is not None


@given(st.integers(1, 10**12), st.floats(1e8, 1e10), st.floats(1, 4), st.floats(1e8, 1e10))
def test_a_swap_takes_bytes_over_rate_and_never_less_over_the_link(
    size: int, disk: float, more: float, link: float
) -> None:
    rate = disk, more * disk
    swap, over = swap_seconds(size, rate), link_seconds(size, rate, (link, link))
    assert swap is not None
    assert over is not None
    assert swap == pytest.approx((size / (more * disk), size / disk))
    assert over[0] >= swap[0]
    assert over[1] >= swap[1]
    assert over[1] == pytest.approx(size / min(disk, link))
    assert swap_seconds(size, None) is link_seconds(size, None, (link, link)) is None


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 20), st.integers(0, 500))
def test_how_many_go_in_is_counted_one_by_one(base: int, adapter: int, cache: int, room: int) -> None:
    whole = next(n for n in range(room + 2) if (n + 1) * (base + cache) > room)
    assert fitting_models(base, cache, room) == whole
    shared = next(n for n in range(room + 2) if base + (n + 1) * (adapter + cache) > room)
    assert adapters_held(base, adapter, cache, room) == (shared if room >= base else 0)


def test_adapters_share_a_base_and_whole_models_do_not() -> None:
    places = [place("big", 100)]
    whole = federate([Member(f"w{i}", 20) for i in range(8)], places, BASES)
    shared = federate([Member(f"s{i}", 1, 0, "b") for i in range(8)], places, BASES)
    assert (len(whole.hot_without_room), whole.used["big"]) == (3, 100)
    assert (len(shared.hot_without_room), shared.used["big"]) == (0, 28)


def test_the_most_asked_for_come_first_and_the_cold_wait_on_a_disk() -> None:
    members = [Member("rare", 6, weight=1), Member("often", 6, weight=9), Member("cold", 6, hot=False)]
    rare, often, cold = federate(members, [place("one", 10), place("two", 7)], BASES).homes
    assert (often.node, rare.node) == ("two", "one"), "the fullest that takes it"
    assert (cold.node, cold.disk is not None) == (None, True)
