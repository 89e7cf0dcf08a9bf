"""What a run expects of mixed sources, counted here by hand, and what the ranks and a report are told of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.test_batches import make_dataset
from support.planning import catalog_spec

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.data.rows import Joined
from mlx_empire.data.splits import Splits, join_splits
from mlx_empire.errors import UserError
from mlx_empire.formats.model_card import model_card
from mlx_empire.recipe.load import parse_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.run.job import Job
from mlx_empire.run.shared_rows import shared_splits
from mlx_empire.run.sources import data_size, sources_told

TEXT = """\
model: {path: m}
data: {sources: SOURCES, sequence_length: 64}
batch: {global_size: 4}
optimizer: {learning_rate: 1.0}
run: {dir: r, steps: STEPS}
"""
# Rows of 4 and of 20 tokens: of 3 and 19 targets every third does not count, so 2 and 13 do.
SHORT, LONG = make_dataset([4] * 6, 64, False), make_dataset([20] * 10, 64, False)
BOTH = Joined((SHORT, LONG))


def recipe(sources: str, steps: str = "100") -> Recipe:
    return parse_recipe(TEXT.replace("SOURCES", sources).replace("STEPS", steps), "x.yaml")


def test_targets_are_counted_as_the_mixture_draws_them() -> None:
    """Three of four rows are short in the first half and none in the second: 3/8 of all."""
    mixed = recipe("[{path: a, weight: 3, to: 0.5}, {path: b}]", "664tok")
    per_row = 3 / 8 * 2 + 5 / 8 * 13
    assert (data_size(mixed, BOTH).rows, data_size(mixed, BOTH).targets) == (16, round(16 * per_row))
    job = Job.of(mixed, BOTH)
    assert job.steps == 19, "664 targets of 35.5 a step"
    assert sum(map(job.targets, range(1, job.steps + 1))) == pytest.approx(664, rel=0.1)
    assert Job.of(recipe("[{path: a}, {path: b}]", "3ep"), BOTH).steps == 12, "16 rows an epoch"


def test_each_source_is_told_with_its_share_and_passes() -> None:
    mixed = recipe("[{path: a, weight: 3}, {path: b}]")
    assert sources_told(mixed, BOTH, 100) == [
        "WARNING: source a: 6 rows, 12 targets; 75.0% of the rows that are read, about 50 passes over it: beyond 16 "
        "repeating rows adds little; lower its weight, or add rows",
        "source b: 10 rows, 130 targets; 25.0% of the rows that are read, about 10 passes over it",
    ]
    assert (
        sources_told(
            parse_recipe(TEXT.replace("sources: SOURCES", "path: a").replace("STEPS", "9"), "x"), SHORT, 9
        )
        == []
    )


def test_a_source_that_opens_for_less_than_a_step_is_told() -> None:
    mixed = recipe("[{path: a}, {path: b, from: 0.11, to: 0.19}]", "10")
    assert sources_told(mixed, BOTH, 10)[1].startswith("WARNING: source b")
    assert sources_told(mixed, BOTH, 10)[1].endswith("no step begins between its from and to")


def splits(train: Any, valid: Any = None, digest: str = "d", *report: str) -> Splits:
    return Splits(train, valid, list(report), digest)


def test_what_is_held_out_of_any_source_is_measured_on() -> None:
    first, second = splits(SHORT, LONG, "1", "read", "WARNING: odd"), splits(LONG, None, "2", "read")
    made = join_splits({Path("a"): first, Path("b"): second})
    assert (len(made.train), made.valid) == (16, LONG)
    assert made.report[:3] == ["a: read", "WARNING: a: odd", "b: read"]
    assert made.report[3] == "nothing is held out of b: evaluations are of a alone"
    assert made.warnings == ["WARNING: a: odd"]
    both = join_splits({Path("a"): splits(SHORT, SHORT, "1"), Path("b"): splits(LONG, LONG, "2")})
    assert both.valid is not None
    assert len(both.valid) == len(SHORT) + len(LONG)
    assert both.valid.tokens_per_epoch == SHORT.tokens_per_epoch + LONG.tokens_per_epoch
    other = join_splits({Path("b"): second, Path("a"): first})
    assert len({made.digest, other.digest, first.digest, second.digest}) == 4
    assert join_splits({Path("a"): first}) is first


class Wire(SoloCommunicator):
    """A rank that gets what rank 0 sent, in turn; only rank 0 has the data."""

    def __init__(self, rank: int, sent: list[Any]) -> None:
        super().__init__("here")
        self.rank, self._sent, self._next = rank, sent, iter(list(sent))

    def broadcast_json(self, value: Any) -> Any:
        return self._through(value)

    def gather_arrays(self, array: np.ndarray) -> list[np.ndarray]:
        return [self._through(array)]

    def gather_json(self, value: Any) -> list[Any]:
        return [False] if isinstance(value, bool) else [value]

    def _through(self, value: Any) -> Any:
        if self.rank == 0:
            self._sent.append(value)
            return value
        return next(self._next)


@pytest.mark.parametrize("valid", [None, SHORT, Joined((LONG, SHORT))])
def test_rows_of_several_sources_reach_a_rank_that_has_none(valid: Any) -> None:
    sent: list[Any] = []
    shared_splits(Wire(0, sent), lambda: splits(BOTH, valid, "d", "told"), available=True)
    got = shared_splits(Wire(1, sent), lambda: pytest.fail("it has no data"), available=False)
    assert got.digest == "d"
    assert "sent to the other ranks" in got.report[-1]
    for mine, theirs in ((BOTH, got.train), (valid, got.valid)):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert [len(part) for part in theirs.parts] == [len(part) for part in mine.parts]
            for index in range(len(mine)):
                assert all(map(np.array_equal, mine.row(index), theirs.row(index)))


def test_who_reads_one_place_alone_says_so() -> None:
    with pytest.raises(UserError, match=r"data\.sources: a, b: one place is needed here") as refused:
        _ = recipe("[{path: a}, {path: b}]").data.only_path
    assert "\n" not in str(refused.value)


def test_the_model_card_names_every_source_and_its_weight() -> None:
    asked = recipe("[{path: a, weight: 3, to: 0.5}, {path: b}]")
    card = model_card(asked, catalog_spec("llama-3.2-1b", asked), [], "sha256:0", None)
    assert "| data | `a`, weight 3 from 0 to 0.5 |\n| data | `b`, weight 1 |" in card
