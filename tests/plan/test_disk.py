"""The disk ledger against arithmetic by hand: what must fit, what is asked for, and what several ranks share."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.disks import places
from support.planning import llama_like, recipe_of

from mlx_empire.capacity.disks import disk_notes
from mlx_empire.disk import with_headroom
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.disk import Beside, DiskLedger, Keeping, disk_ledgers, disk_verdict, keeper_of
from mlx_empire.plan.shards import make_plan
from mlx_empire.recipe.schema import Recipe

TINY = llama_like(layers=2)
PARAMETERS = 2 * 1024 * 256 + 2 * (4 * 256**2 + 3 * 256 * 1024)
APART = (("a", "b"), ("king", "soldier"))


def ledgers(
    recipe: Recipe, where=APART, shares=(3.0, 1.0), steps: int | None = 100, beside=None, **more
) -> tuple[DiskLedger, ...]:
    plan = make_plan(TINY.units, shares, 3)
    keeping, states = Keeping.of(recipe.run, steps), state_bytes_of(recipe.optimizer)
    return disk_ledgers(TINY, plan, keeping, states, places(*where, **more), beside or Beside())


@pytest.mark.parametrize(
    ("written", "steps", "saves", "asked", "least", "at_the_end"),
    [
        (["run.save_every=10", "run.keep_last=3"], 100, 10, 4, 2, 3),
        (["run.save_every=10"], 100, 10, 10, 2, 10),
        (["run.save_every=30"], 100, 4, 4, 2, 4),
        (["run.save_every=10%", "run.keep_last=1"], None, 10, 2, 2, 1),
        (["run.save_every=1ep", "run.keep_last=2"], None, None, 3, 2, 2),
        (["run.save_every=1Mtok"], 100, None, 2, 2, 2),
        (["run.save_every=100", "run.keep_last=3"], 100, 1, 1, 1, 1),
        ([], 100, 0, 0, 0, 0),
    ],
)
def test_how_many_checkpoints_lie_there(written, steps, saves, asked, least, at_the_end):
    keeping = Keeping.of(recipe_of(*written).run, steps)
    assert keeping.saves == saves
    assert (keeping.asked, keeping.least, keeping.at_the_end) == (asked, least, at_the_end)


@pytest.mark.parametrize(("bits", "state"), [("32", 2 + 4 + 4 + 2), ("8", 2 + 1 + 1 + 5 / 64 + 2)])
def test_a_checkpoint_is_weights_states_and_remainders_by_share(bits, state):
    """By hand: bfloat16 weight, two moments, 16 more bits of the master; headers and manifest take a little more."""
    king, soldier = ledgers(recipe_of("run.save_every=10", f"optimizer.state_bits={bits}"))
    for one, share in ((king, 0.75), (soldier, 0.25)):
        assert 0 <= one.checkpoint - share * state * PARAMETERS < 0.01 * PARAMETERS + 64 * 1024
    assert king.result == 2 * PARAMETERS
    assert soldier.result == 0
    assert abs(king.copies - 0.25 * state * PARAMETERS) < 0.01 * PARAMETERS


def test_what_must_fit_and_what_is_asked_for():
    one = DiskLedger("d", "king", 100, 40, Keeping(10, 3, True), 150, 7, 5, None)
    assert one.asked == with_headroom(3 * 140 + 150 + 7 + 5)  # at the end, more than the 4 x 140 before
    for building, worst in ((570, 570), (9999, 9999)):  # while tokens are written there is no checkpoint
        assert replace(one, building=building).asked == with_headroom(worst + 7 + 5)
        assert replace(one, building=building).least == one.least
    assert one.least == with_headroom(100 + 150 + 7)
    small = DiskLedger("d", "king", 100, 40, Keeping(10, 3, True), 30, 0, 0, None)
    assert (small.asked, small.least) == (with_headroom(4 * 140), with_headroom(200))
    without = DiskLedger("d", "king", 0, 0, Keeping(0, None, False), 30, 0, 0, None)
    assert (without.asked, without.least) == (with_headroom(30), with_headroom(30))


def test_ranks_of_one_machine_count_once_on_their_disk():
    recipe = recipe_of("run.save_every=10")
    (one,) = ledgers(recipe, where=(("a", "a"), ("king", "king")))
    apart = ledgers(recipe)
    assert one.copies == 0, "one folder, so there are no copies"
    total = sum(each.checkpoint for each in apart)
    assert 0 < total - one.checkpoint < 64 * 1024, "one manifest in the place of two"
    (same,) = ledgers(recipe, where=(("a", "b"), ("king", "king")))
    assert same.checkpoint == total, "two folders on one disk are two manifests"
    assert same.copies == sum(each.copies for each in apart)


def test_a_result_on_another_disk_is_counted_there():
    first = {"first": "big"}
    found = ledgers(recipe_of("run.save_every=10"), beside=Beside(carried=11, base=5, tokens=3), **first)
    king, soldier, big = found
    assert (king.result, soldier.result, big.result) == (0, 0, 2 * PARAMETERS + 11)
    assert (big.base, big.tokens, big.checkpoint, big.keeping.asked) == (5, 3, 0, 0)


@pytest.mark.parametrize(
    ("free", "verdict", "words"),
    [
        (0, "no", "needs"),
        (-1, "no", "needs"),
        (None, None, ""),
        ("least", "tight", "copies and old checkpoints will go for room"),
        ("asked", "fits", ""),
    ],
)
def test_verdicts(free, verdict, words):
    recipe = recipe_of("run.save_every=10", "run.keep_last=3")
    whole = ledgers(recipe)[0]
    sizes = {"least": whole.least, "asked": whole.asked, -1: whole.least - 1, 0: 0}
    known = {} if free is None else {"king": sizes[free]}
    king, soldier = ledgers(recipe, free=known)
    assert king.verdict == verdict
    assert words in king.reason
    assert soldier.verdict is None
    assert disk_verdict((king, soldier)) == (verdict or "fits")


def test_no_checkpoints_and_no_copies_where_none_are_asked_for():
    (king,) = ledgers(recipe_of())
    assert (king.checkpoint, king.copies, king.result) == (0, 0, 2 * PARAMETERS)
    assert [one.copies for one in ledgers(recipe_of("run.save_every=10", "run.buddy=false"))] == [0, 0]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_every_shard_has_a_copy_elsewhere_where_there_are_two_folders(folders):
    for rank in range(len(folders)):
        keeper = keeper_of(rank, folders)
        assert (keeper is None) == (len(set(folders)) == 1)
        assert keeper is None or folders[keeper] != folders[rank]


def test_a_plan_says_that_it_cannot_know_of_disks_that_machines_share():
    recipe = recipe_of("run.save_every=10")
    apart = ledgers(recipe, (("a", "b"), ("king:1", "soldier:1")))
    assert sum("network" in note for note in disk_notes(apart)) == 1
    two_disks_of_one = ledgers(recipe, (("a", "b"), ("king:1", "king:2")))
    assert not [note for note in disk_notes(two_disks_of_one) if "network" in note]
