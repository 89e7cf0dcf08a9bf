"""Cells and shares by properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_empire.errors import UserError
from mlx_empire.plan.shares import solve_shares
from mlx_empire.plan.workload import CellLayout, cell_layout


@st.composite
def layouts(draw):
    micro_batches = draw(st.integers(1, 50))
    return CellLayout(micro_batches, draw(st.integers(1, micro_batches)), draw(st.integers(1, 8)))


@given(layouts())
def test_each_micro_batch_is_computed_once_and_cells_are_in_order(layout):
    order = {}
    for rank in range(layout.world_size):
        assert len(layout.of_rank(rank)) == layout.rounds
        for r, members in enumerate(layout.of_rank(rank)):
            assert bool(members) == layout.contributes(r)[rank]
            order[r, rank] = list(members)
    flat = [j for key in sorted(order) for j in order[key]]
    assert flat == list(range(layout.micro_batches))


@given(layouts())
def test_what_a_cell_holds_does_not_depend_on_the_number_of_ranks(layout):
    alone = CellLayout(layout.micro_batches, layout.cells, 1)
    assert [list(m) for m in alone.of_rank(0)] == [list(layout.members(c)) for c in range(layout.cells)]


def test_auto_cells():
    assert cell_layout(32, 2, "auto", 4).cells == 4
    assert cell_layout(2, 1, "auto", 4).cells == 2
    with pytest.raises(UserError, match=r"batch\.cells"):
        cell_layout(8, 2, 5, 1)


@given(st.lists(st.tuples(st.integers(1, 10**12), st.integers(0, 10**12)), min_size=1, max_size=8))
def test_memory_shares_give_equal_use_of_what_is_left(nodes):
    limits, fixed = [n[0] for n in nodes], [n[1] for n in nodes]
    shares = solve_shares("memory", limits, fixed)
    assert sum(shares) == pytest.approx(1)
    left = [max(limit - need, 0) for limit, need in nodes]
    if sum(left):
        for share, room in zip(shares, left, strict=True):
            assert share == pytest.approx(room / sum(left))
    else:
        assert shares == pytest.approx([limit / sum(limits) for limit in limits])


def test_equal_and_listed_shares():
    assert solve_shares("equal", [10, 1], [0, 0]) == (0.5, 0.5)
    assert solve_shares([1, 3], [1, 1], [0, 0]) == (0.25, 0.75)
    with pytest.raises(UserError, match="names 3 ranks but 2 run"):
        solve_shares([1, 2, 3], [1, 1], [0, 0])
