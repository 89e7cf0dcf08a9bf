"""Who is trained where, and what a board makes of the workers' lines."""

import io

import pytest
from rich.console import Console

from mlx_empire.daughters.jobs import (
    DONE,
    FAILED,
    LOST,
    TRAINING,
    WAITING,
    Jobs,
    JobState,
    deal,
    event,
    homes_of,
    people_of,
)
from mlx_empire.daughters.table import DaughterTable
from mlx_empire.errors import UserError


def test_the_heaviest_come_first_and_places_count():
    weights = {"a": 100, "b": 10, "c": 10, "d": 10, "e": 10, "f": 10}
    king, soldier = deal(sorted(weights), weights, [3, 1])
    assert "a" in king
    assert sorted(king + soldier) == sorted(weights)
    # 100 bytes are as much to the king's three places as 33 to the soldier's one: three tens fit before it is later.
    assert sorted(soldier) == ["b", "c", "d"]


def test_a_machine_without_a_place_gets_nobody():
    assert deal(["a", "b"], {}, [0, 1]) == [[], ["a", "b"]]
    with pytest.raises(UserError, match="no machine has room"):
        deal(["a"], {}, [0, 0])


def test_dealing_is_the_same_whoever_asks():
    names = [f"p{i}" for i in range(20)]
    weights = {name: 7 * i % 5 for i, name in enumerate(names)}
    assert deal(names, weights, [2, 3]) == deal(list(reversed(names)), weights, [2, 3])


def test_whoever_began_on_a_machine_returns_to_it():
    kept = [["a", "b", "c"], ["c", "d"], ["c"]]
    homes = homes_of(kept)
    assert homes == {"a": 0, "b": 0, "c": 2, "d": 1}
    dealt = deal(list("abcdefgh"), {}, [1, 1, 1], homes)
    assert [set(names) & homes.keys() for names in dealt] == [{"a", "b"}, {"d"}, {"c"}]
    assert sorted(len(names) for names in dealt) == [2, 3, 3]
    assert deal(["a"], {}, [0, 1, 0], {"a": 0}) == [[], ["a"], []]  # there is no place for it any more


def test_a_board_adds_lines_up():
    jobs = Jobs({"anna": JobState("anna"), "bert": JobState("bert"), "carl": JobState("carl")})
    assert jobs.take(event("anna", state=TRAINING, machine="king", step=0, steps=10))
    jobs.take(event("anna", step=4))
    jobs.take(event("bert", state=DONE, step=10, held_out=1.5))
    jobs.take(event("carl", state=FAILED, note="bad data"))
    assert not jobs.take("loading weights")
    assert not jobs.take("@daughter {broken")
    anna = jobs.states["anna"]
    assert (anna.machine, anna.step, anna.steps) == ("king", 4, 10)
    assert anna.left > 0
    jobs.take(event("dora", state=TRAINING, step=6, steps=8))
    assert jobs.states.pop("dora").left is None  # it goes on, and has done no step yet
    assert jobs.finished == 1
    jobs.end()
    assert [s.state for s in jobs.states.values()] == [LOST, DONE, FAILED]


def test_the_table_shows_every_state(monkeypatch):
    jobs = Jobs(
        {
            "anna": JobState("anna", "king", TRAINING, 4, 10, 2.0, 2.5),
            "b[red]": JobState("b[red]", state=WAITING),
        }
    )
    table = DaughterTable(jobs)
    out = io.StringIO()
    Console(file=out, width=100).print(table._table(10))
    text = out.getvalue()
    assert "4/10" in text
    assert "2.5000 > 2.0000" in text
    assert "b[red]" in text
    assert "1 training, 1 waiting" in text


def test_without_a_terminal_what_is_new_is_said_once(capsys):
    jobs = Jobs({"anna": JobState("anna", "king"), "bert": JobState("bert")})
    table = DaughterTable(jobs)
    lines = [event("anna", state=TRAINING, step=0, steps=4), event("anna", step=1)]
    lines += [event("anna", step=2, note="step 2 could not be saved"), event("anna", step=3)]
    for line in [*lines, event("anna", state=DONE, note="")]:
        jobs.take(line)
        table.update()
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "anna: training on king",
        "anna: training on king: step 2 could not be saved",
        "anna: done on king",
    ]


def test_people_are_sub_folders(tmp_path):
    with pytest.raises(UserError, match="no sub-folders"):
        people_of(tmp_path)
    for name in ("bert", "anna", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").touch()
    assert people_of(tmp_path) == ["anna", "bert"]
    (tmp_path / "a\nb").mkdir()
    with pytest.raises(UserError, match="is no name for a folder"):
        people_of(tmp_path)
