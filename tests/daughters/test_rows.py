"""Which rows a generation learns is a function of what the rows say: the new ones, and a share of the old ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_empire.daughters.rows import Learnt, Offered, as_lines, of_the_first, of_the_next, rows_of
from mlx_empire.recipe.sections import DataSection


def offered(folder: Path, train: list[int], valid: list[int] | None = None) -> Offered:
    """Rows that hold one number each, as they lie in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in (("train", train), ("valid", valid)):
        path = folder / f"{name}.jsonl"
        path.unlink(missing_ok=True)
        if numbers is not None:
            path.write_text("".join(json.dumps({"tokens": [n, n]}) + "\n" for n in numbers))
    return rows_of(DataSection(path=folder, sequence_length=8))


def numbers(rows: Offered, names: tuple[str, ...]) -> list[int]:
    """What these rows hold, read back from the lines that are written of them."""
    known = {**rows.train, **(rows.valid or {})}
    return [json.loads(line)["tokens"][0] for line in as_lines(known, names).splitlines()]


def test_new_rows_and_a_share_of_old_ones_wherever_they_stand(tmp_path: Path) -> None:
    old = list(range(1000))
    first = of_the_first(offered(tmp_path, old, [5000]), None)
    assert (len(first.train), len(first.valid)) == (1000, 1)
    now = offered(tmp_path, [7001, *reversed(old), 7002], [5000, 5001])
    found = of_the_next(now, [first], 2, None, None)
    assert found is not None
    learnt = numbers(now, found.train)
    assert {7001, 7002} < set(learnt)
    assert numbers(now, found.valid) == [5000, 5001]
    assert len(learnt) - 2 == pytest.approx(250, abs=45)  # a quarter, within three standard deviations
    # The same rows in another order, and beside others, are the same choice; another generation has another one.
    again = offered(tmp_path, [*old, 7001, 7002, 7003], [5000])
    same = of_the_next(again, [first], 2, None, None)
    assert same is not None
    assert set(numbers(again, same.train)) == {*learnt, 7003}
    other = of_the_next(now, [first], 3, None, None)
    assert other is not None
    assert set(numbers(now, other.train)) != set(learnt)
    assert same.offered != found.offered


@pytest.mark.parametrize(("replay", "learnt"), [(0.0, [9]), (1.0, [1, 2, 3, 9])])
def test_none_or_all_of_the_old_rows(replay: float, learnt: list[int], tmp_path: Path) -> None:
    first = of_the_first(offered(tmp_path, [1, 2, 3], [8]), None)
    now = offered(tmp_path, [1, 2, 3, 9], [8])
    found = of_the_next(now, [first], 2, replay, None)
    assert found is not None
    assert numbers(now, found.train) == learnt


def test_a_row_that_was_taken_away_is_not_learnt_again(tmp_path: Path) -> None:
    first = of_the_first(offered(tmp_path, [1, 2, 3], [8]), None)
    now = offered(tmp_path, [1, 3, 9], [8])
    found = of_the_next(now, [first], 2, 1.0, None)
    assert found is not None
    assert numbers(now, found.train) == [1, 3, 9]
    assert of_the_next(offered(tmp_path, [3, 1], [8]), [first], 2, 1.0, None) is None


def test_what_was_held_out_once_is_never_learnt(tmp_path: Path) -> None:
    """Over ten generations of growing files, with a split in place of a file."""
    now = offered(tmp_path, list(range(20)))
    found: Learnt | None = of_the_first(now, 0.2)
    assert found is not None
    before, held = [found], set(found.valid)
    assert len(held) == 4
    for number in range(2, 12):
        now = offered(tmp_path, list(range(20 * number)))
        found = of_the_next(now, before[::-1], number, 0.5, 0.2)
        assert found is not None
        assert held <= set(found.valid)
        assert not set(found.valid) & {name for one in (*before, found) for name in one.train}
        held |= set(found.valid)
        before.append(found)
    assert len(held) == pytest.approx(44, abs=19)
    assert len({name for one in before for name in one.train} | held) == 220


def test_a_row_that_stands_twice_is_learnt_twice(tmp_path: Path) -> None:
    first = of_the_first(offered(tmp_path, [1, 1], [8]), None)
    assert len(first.train) == 2
    now = offered(tmp_path, [1, 4, 4], [8])
    found = of_the_next(now, [first], 2, 0.0, None)
    assert found is not None
    assert numbers(now, found.train) == [4, 4]
