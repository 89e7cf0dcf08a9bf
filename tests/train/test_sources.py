"""Runs on mixed sources and in the file's order, by the command that a user types: rows, report, bits, resume."""

from __future__ import annotations

from pathlib import Path

import pytest
from train.launching import Outcome, Workspace, curve, held_out, jsonl, raw_tensors, step_records, succeeded

from mlx_empire.data.order import InFileOrder, Mixed, Shuffled
from mlx_empire.recipe.load import load_recipe

# Rows of a length of their own each, so that a step's targets say which rows it read.
ROWS = {"poems": range(3, 10), "letters": range(20, 61, 10)}
SOURCES = "data.sources=[{path: poems, weight: 3, to: 0.75}, {path: letters, from: 0.25}]"
MIXED = ["recipe.yaml", "data.path=null", SOURCES, "data.format=tokens", "run.steps=8", "run.eval_every=4"]


def lengths_of(run: Path) -> list[int]:
    """How many targets each step counted."""
    return [record["tokens"] for record in step_records(run)]


@pytest.fixture(scope="module")
def runs(workspace: Workspace) -> dict[str, Outcome]:
    """On one rank, then on two: the same, and what goes on from the first one's third step."""
    for name, lengths in ROWS.items():
        rows = ({"tokens": [(7 * n + place) % 500 for place in range(n + 1)]} for n in lengths)
        workspace.write(f"{name}/train.jsonl", jsonl(rows))
    workspace.write("poems/valid.jsonl", jsonl([{"tokens": list(range(40))}, {"tokens": list(range(9))}]))
    workspace.write("letters/valid.jsonl", jsonl([{"tokens": list(range(60, 90))}]))
    in_order = ["data.path=letters", "data.order=file", "data.format=tokens", "run.dir=in-order"]
    (made,) = workspace.train_many(
        {
            "mixed": [*MIXED, "run.dir=mixed", "run.save_every=3", "run.keep_last=9"],
            "in order": ["recipe.yaml", *in_order],
        }
    )
    saved = workspace.folder / "mixed" / "checkpoints" / "step-000003"
    again = [*MIXED, f"run.resume={saved}"]
    other = [SOURCES.replace("weight: 3", "weight: 2"), "run.dir=other"]
    ranks = workspace.train_many(
        {
            "two ranks": [*MIXED, "run.dir=two ranks", "memory.zero_stage=3"],
            "resumed": [*again, "run.dir=resumed"],
            "other weights": [*again, *other],
            "longer": [*again, "run.dir=longer", "run.steps=9", "schedule.type=constant", "schedule.final=0"],
        },
        ranks=2,
    )
    return made | ranks[0]


def test_a_mixture_reads_the_rows_that_its_order_says(workspace: Workspace, runs: dict[str, Outcome]) -> None:
    succeeded(runs["mixed"])
    sources = load_recipe(workspace.folder / "mixed" / "recipe.yaml").data.sources
    lengths = [[*rows] for rows in ROWS.values()]
    each = [Shuffled(len(rows), 0, place) for place, rows in enumerate(lengths)]
    order = Mixed(sources, each, [len(rows) for rows in lengths], 0, 6, 8)
    every = [*lengths[0], *lengths[1]]
    expected = [sum(every[row] for row in order.rows_at(6 * step, 6)) for step in range(8)]
    assert lengths_of(workspace.folder / "mixed") == expected
    assert max(expected[:2]) <= 6 * 9, "poems alone"
    assert min(expected[6:]) >= 6 * 20, "letters alone"


def test_rows_are_read_as_the_file_has_them(workspace: Workspace, runs: dict[str, Outcome]) -> None:
    succeeded(runs["in order"])
    every = [*ROWS["letters"]]
    rows = InFileOrder(len(every)).rows_at(0, 18).tolist()
    assert rows == [*range(5), *range(5), *range(5), 0, 1, 2]
    expected = [sum(every[row] for row in rows[6 * step : 6 * step + 6]) for step in range(3)]
    assert lengths_of(workspace.folder / "in-order") == expected


@pytest.mark.parametrize("name", ["two ranks", "resumed"])
def test_ranks_and_a_resume_change_no_bit(workspace: Workspace, runs: dict[str, Outcome], name: str) -> None:
    succeeded(runs[name])
    whole, other = workspace.folder / "mixed", workspace.folder / name
    assert raw_tensors(other / "final") == raw_tensors(whole / "final")
    begins = 3 if name == "resumed" else 0
    assert curve(other) == curve(whole)[begins:]
    assert held_out(other) == [one for one in held_out(whole) if one[0] > begins or not begins]


@pytest.mark.parametrize(("name", "key"), [("other weights", "data.sources"), ("longer", "run.steps")])
def test_what_would_mix_the_rest_of_a_run_otherwise_is_refused(
    runs: dict[str, Outcome], name: str, key: str
) -> None:
    assert runs[name].code == 64
    assert f"{key}: " in runs[name].said[0]
    assert "run.accept_changes" in runs[name].said[0]


def test_the_report_says_how_often_each_source_is_read(runs: dict[str, Outcome]) -> None:
    said = runs["mixed"].stdout
    # 48 positions: 12 of poems alone, 24 with 3 in 4 of them, 12 of letters alone.
    assert "source poems: 7 rows, 42 targets; 62.5% of the rows that are read, about 4.29 passes" in said
    assert "source letters: 5 rows, 200 targets; 37.5% of the rows that are read, about 3.6 passes" in said


def test_an_epoch_of_a_mixture_is_as_many_rows_as_all_have_together(
    workspace: Workspace, runs: dict[str, Outcome]
) -> None:
    succeeded(runs["mixed"])
    epochs = [record["epoch"] for record in step_records(workspace.folder / "mixed")]
    assert epochs == [6 * step / 12 for step in range(1, 9)]
