"""Sources mixed by weight: against draws made one by one in Python, whole numbers and fractions all through."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from math import exp, lgamma, log

import numpy as np
import pytest
from data.test_batches import make_dataset
from data.test_order import philox_4x64
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_empire.data import order
from mlx_empire.data.batches import micro_batch, positions, valid_tokens
from mlx_empire.data.order import InFileOrder, Mixed, Order, Shuffled
from mlx_empire.data.rows import Joined
from mlx_empire.recipe.mixture import DataSource, paths_of, shares

LENGTHS = [7, 3, 11]
EDGES = ["0", "0.1", "0.25", "0.3", "0.5", "0.75", "1"]


def source(path: str, weight: float = 1.0, start: float = 0.0, end: float = 1.0) -> DataSource:
    return DataSource.model_validate({"path": path, "weight": weight, "from": start, "to": end})


@st.composite
def several(draw: st.DrawFn) -> list[DataSource]:
    """Two to four entries for up to three paths; the first is open all the time."""
    made = [source("a", draw(st.sampled_from([0.1, 1.0, 3.0])))]
    for path in draw(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3)):
        low, high = sorted(
            draw(st.lists(st.sampled_from(EDGES), min_size=2, max_size=2, unique=True)), key=float
        )
        made.append(source(path, draw(st.sampled_from([0.2, 1.0, 7.5])), float(low), float(high)))
    return made


def mixed(
    sources: list[DataSource], seed: int, global_size: int, steps: int, *, shuffled: bool = True
) -> Mixed:
    lengths = LENGTHS[: len(paths_of(sources))]
    each: list[Order] = [
        Shuffled(rows, seed, place) if shuffled else InFileOrder(rows) for place, rows in enumerate(lengths)
    ]
    return Mixed(sources, each, lengths, seed, global_size, steps)


def sources_of(rows: np.ndarray, lengths: list[int] = LENGTHS) -> np.ndarray:
    """The source (n,) of each row, for they lie one after the other."""
    return np.searchsorted(np.cumsum(lengths), rows, side="right")


def one_by_one(sources: list[DataSource], seed: int, global_size: int, steps: int) -> list[tuple[int, int]]:
    """(source, how many of it came before) of every position of a run."""
    paths = [str(path) for path in paths_of(sources)]
    drawn: Counter[int] = Counter()
    found = []
    for position in range(steps * global_size):
        now = Fraction(position // global_size, steps)
        weights = dict.fromkeys(range(len(paths)), Fraction(0))
        for one in sources:
            if Fraction(str(one.start)) <= now < Fraction(str(one.end)):
                weights[paths.index(str(one.path))] += Fraction(str(one.weight))
        word = philox_4x64(position // 4 + 1, (seed, 2**64 - 1))[position % 4]
        left = Fraction(word, 2**64) * sum(weights.values())
        chosen = -1
        while left >= 0:
            chosen += 1
            left -= weights[chosen]
        found.append((chosen, drawn[chosen]))
        drawn[chosen] += 1
    return found


@given(
    sources=several(),
    seed=st.integers(0, 2**40),
    global_size=st.integers(1, 5),
    steps=st.integers(1, 12),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_any_position_alone_reads_what_draws_one_by_one_give(sources, seed, global_size, steps, data):
    offsets = np.cumsum([0, *LENGTHS])
    expected = [
        int(offsets[chosen] + Shuffled(LENGTHS[chosen], seed, chosen).rows_at(number, 1)[0])
        for chosen, number in one_by_one(sources, seed, global_size, steps)
    ]
    first = data.draw(st.integers(0, len(expected) - 1))
    count = data.draw(st.integers(1, len(expected) - first))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "BLOCK", 8)  # so that runs of a few steps have many
        assert (
            mixed(sources, seed, global_size, steps).rows_at(first, count).tolist()
            == expected[first : first + count]
        )


def test_what_is_read_across_blocks_does_not_depend_on_where_one_begins():
    sources = [source("a", 2), source("b", 1, 0.5), source("c", 3, 0, 0.75)]
    edge = 3 * order.BLOCK
    whole = mixed(sources, 5, 64, 1000).rows_at(edge - 500, 1000).tolist()
    asked = mixed(sources, 5, 64, 1000)
    assert [row for first in range(edge - 500, edge + 500, 50) for row in asked.rows_at(first, 50)] == whole


@pytest.mark.parametrize("shuffled", [True, False])
def test_each_source_is_read_as_it_is_alone(shuffled):
    made = mixed([source("a", 2), source("b", 1, 0.5), source("c", 3, 0, 0.75)], 3, 4, 200, shuffled=shuffled)
    rows, chosen = made.rows_at(0, 800), sources_of(made.rows_at(0, 800))
    for place, length in enumerate(LENGTHS):
        own = rows[chosen == place] - sum(LENGTHS[:place])
        assert len(own) > 3 * length
        alone = Shuffled(length, 3, place) if shuffled else InFileOrder(length)
        assert own.tolist() == alone.rows_at(0, len(own)).tolist()


def test_a_lone_source_is_read_as_a_path_is():
    alone = mixed([source("a", 0.3)], 9, 4, 10)
    assert alone.rows_at(0, 40).tolist() == Shuffled(LENGTHS[0], 9).rows_at(0, 40).tolist()


def test_sources_open_and_close_at_steps():
    """Of ten steps 0.25 to 0.5 are the steps 3 and 4 (from 0): the first that is not before a quarter is 3."""
    sources = [source("a", 1, 0, 0.25), source("b", 1, 0.25, 0.5), source("c", 1, 0.5)]
    drawn = sources_of(mixed(sources, 0, 4, 10).rows_at(0, 40)).reshape(10, 4)
    assert drawn[:, 0].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert (drawn == drawn[:, :1]).all()
    assert [float(share) for share in shares(sources)] == [0.25, 0.25, 0.5]
    assert [float(share) for share in shares(sources, 10)] == [0.3, 0.2, 0.5]


def test_a_path_that_stands_twice_is_one_source_with_other_weights():
    sources = [source("a", 1, 0, 0.5), source("b"), source("a", 9, 0.5)]
    made = mixed(sources, 1, 10, 100)
    chosen, rows = sources_of(made.rows_at(0, 1000)), made.rows_at(0, 1000)
    assert set(chosen.tolist()) == {0, 1}
    assert rows[chosen == 0].tolist() == Shuffled(LENGTHS[0], 1).rows_at(0, int((chosen == 0).sum())).tolist()
    assert abs((chosen[500:] == 0).mean() - 0.9) < 0.08 < abs((chosen[:500] == 0).mean() - 0.9)
    assert [float(share) for share in shares(sources)] == [0.7, 0.3]


def tail(count: int, trials: int, chance: float) -> float:
    """The probability that a binomial number of so many trials is at least as far on count's side of its mean."""

    def mass(k: int) -> float:
        ways = lgamma(trials + 1) - lgamma(k + 1) - lgamma(trials - k + 1)
        return exp(ways + k * log(chance) + (trials - k) * log(1 - chance))

    return sum(mass(k) for k in (range(count, trials + 1) if count > chance * trials else range(count + 1)))


@pytest.mark.parametrize("weights", [[1, 1], [0.1, 0.7, 0.2], [1, 1000]])
def test_sources_are_drawn_as_often_as_their_weights_say(weights):
    sources = [source("abc"[place], weight) for place, weight in enumerate(weights)]
    trials = 20_000
    counts = np.bincount(sources_of(mixed(sources, 11, 100, 200).rows_at(0, trials)), minlength=len(weights))
    for count, weight in zip(counts.tolist(), weights, strict=True):
        assert tail(count, trials, weight / sum(weights)) > 1e-3
    assert tail(int(trials * 0.52), trials, 0.5) < 1e-6, "the bound can fail"


@pytest.mark.parametrize("micro_size", [1, 2, 3, 4, 6, 12])
def test_micro_batches_hold_the_same_rows_whatever_their_size(micro_size):
    data = Joined(tuple(make_dataset([n + 2] * rows, 16, False) for n, rows in enumerate(LENGTHS)))
    made = mixed([source("a"), source("b", 2), source("c", 3)], 4, 12, 6)
    for step in (5, 0, 3):
        sizes = {"global_size": 12, "micro_size": micro_size}
        batches = [micro_batch(data, made, step, j, **sizes) for j in range(12 // micro_size)]
        rows = made.rows_at(step * 12, 12).tolist()
        assert [row for batch in batches for row in batch.rows_read] == rows
        assert valid_tokens(data, made, step, global_size=12) == sum(int(b.mask.sum()) for b in batches)
        assert positions(data, made, step, **sizes) == sum(b.inputs.size for b in batches)
        lengths = [int((row != 0).sum()) for batch in batches for row in batch.targets]
        assert lengths == [int(np.searchsorted(np.cumsum(LENGTHS), row, "right")) + 1 for row in rows]
