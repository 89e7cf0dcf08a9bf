"""What comes when, and that a run in targets has as many steps in the dry run as in the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_empire.data.splits import load_splits
from mlx_empire.recipe.load import load_recipe
from mlx_empire.run.job import Job


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty rows of 17 tokens: 16 targets each."""
    monkeypatch.setenv("MLX_EMPIRE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"tokens": [1 + n % 7] * 17}) + "\n" for n in range(40)))
    return file


def steps_of(document: dict) -> float:
    low = document["time"]["run_hours"][0] * 3600 / document["time"]["step_seconds"][0]
    return round(low, 6)


def test_targets_are_counted_where_the_rows_are_there(say, recipe, rows):
    """Rows of 16 targets, four a step: 1,000 targets are 16 steps, where full rows of 64 would make 4 of them."""
    asked = (f"data.path={rows}", "run.steps=1ktok")
    there = say(recipe, "--json", *asked).json
    (note,) = [one for one in there["notes"] if "run.steps" in one]
    assert note == f"run.steps 1000tok: counted on {rows}: 40 rows with 640 counted targets"
    loaded = load_recipe(recipe, asked)
    train = load_splits(path=rows, sequence_length=64).train
    assert steps_of(there) == Job.of(loaded, train).steps == 16


def test_targets_of_a_mixture_are_counted_as_it_draws_them(say, recipe, rows):
    """Rows of 16 and of 4 targets, three of the short ones to one: 7 targets a row, 28 a step."""
    (rows.parent / "short.jsonl").write_text('{"tokens": [1, 2, 3, 4, 5]}\n' * 10)
    sources = f"data.sources=[{{path: {rows}}}, {{path: {rows.parent}/short.jsonl, weight: 3}}]"
    there = say(recipe, "--json", "data.path=null", sources, "run.steps=1ktok").json
    (note,) = [one for one in there["notes"] if "run.steps" in one]
    assert note.endswith(f"counted on {rows}, {rows.parent}/short.jsonl: 50 rows with 350 counted targets")
    assert steps_of(there) == 36


def test_it_is_said_where_they_are_not(say, recipe):
    away = say(recipe, "--json", "run.steps=1ktok").json
    (note,) = [one for one in away["notes"] if "run.steps" in one]
    assert note.startswith(
        "run.steps 1000tok: not counted (nowhere is not here): every position is taken as a target"
    )
    assert steps_of(away) == 4


def test_rows_that_training_would_refuse_are_named(say, recipe, rows):
    rows.write_text("{}\n")
    found = say(recipe, "--json", f"data.path={rows}", "run.steps=2ep", "run.save_every=1ep")
    (note,) = [one for one in found.json["notes"] if "run.steps" in one]
    assert found.code == 0
    assert note.startswith(f"run.steps 2ep, run.save_every 1ep: not counted ({rows}")
    assert note.endswith("the run as 1,000 steps")


def test_the_report_says_what_a_crash_costs_and_when_things_come(say, recipe):
    said = say(recipe, "run.steps=100", "run.save_every=10", "run.eval_every=20")
    lines = {line.split("  ")[0]: line for line in said.out.splitlines()}
    assert {
        "evaluations",
        "first checkpoint",
        "a crash costs at most",
        "the end, if started now",
    } <= lines.keys()
    found = say(recipe, "--json", "run.steps=100", "run.save_every=10", "run.eval_every=20").json["time"]
    for name, steps in (("first_checkpoint_hours", 10), ("first_evaluation_hours", 20), ("lost_hours", 11)):
        assert found[name] == pytest.approx([steps * s / 3600 for s in found["step_seconds"]]), name
    without = say(recipe, "run.steps=100").out
    assert "the whole run: run.save_every is null" in without


def test_a_folder_of_another_kind_than_the_named_one_is_refused(say, recipe):
    said = say(recipe, "model.architecture=llama-4-scout-109b")
    assert said.code == 64
    assert "model.architecture: llama-4-scout-109b: is llama4 of width 5120 with 48 layers" in said.err
