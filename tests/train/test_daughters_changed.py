"""A finished daughter whose rows or recipe changed is told as changed, and is trained anew on demand."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from train.launching import Workspace, curve, raw_tensors
from train.people import run, with_people, worker

from mlx_empire.daughters.changed import changed
from mlx_empire.recipe.load import load_recipe

NAMES = ("anna", "bert")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two people, whose daughters are finished after two steps."""
    made = with_people(tmp_path_factory.mktemp("finished"), NAMES)
    recipe = made.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("steps: 6, eval_every: 3", "steps: 2, eval_every: null"))
    assert worker(made).code == 0
    return made


@pytest.fixture
def copied(finished: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The finished daughters and their rows, for a test of its own, which runs in the folder."""
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_EMPIRE_CACHE", str(tmp_path / "cache"))
    return Workspace(tmp_path)


def other_than_finished(*overrides: str) -> dict[str, str]:
    return changed(load_recipe("recipe.yaml", list(overrides)), Path("people"), NAMES)


def test_new_rows_of_a_finished_daughter_are_never_passed_off_as_done(copied: Workspace) -> None:
    rows = copied.folder / "people" / "anna" / "train.jsonl"
    before, was = rows.read_text(), raw_tensors(copied.folder / "runs" / "anna" / "final")
    others = raw_tensors(copied.folder / "runs" / "bert" / "final")
    rows.write_text(before + before.splitlines()[0].replace("[", "[7, ", 1) + "\n")
    told = run(copied)
    assert told.code == 65
    assert "anna: changed: people/anna holds other rows" in told.stdout
    assert "1 of 2 daughters are in runs" in told.stdout
    assert "run.resume=never trains them anew" in told.stdout
    assert raw_tensors(copied.folder / "runs" / "anna" / "final") == was
    assert run(copied, "run.accept_changes=[data.path]").code == 0

    # On demand it is trained anew, it alone, and is what it would have been from the start.
    assert worker(copied, "run.resume=never").code == 0
    now = raw_tensors(copied.folder / "runs" / "anna" / "final")
    assert now != was
    assert raw_tensors(copied.folder / "runs" / "bert" / "final") == others
    assert other_than_finished() == {}
    shutil.rmtree(copied.folder / "runs")
    shutil.rmtree(copied.folder / "people" / "bert")
    assert worker(copied).code == 0
    assert raw_tensors(copied.folder / "runs" / "anna" / "final") == now
    assert len(curve(copied.folder / "runs" / "anna")) == 2


def test_what_makes_a_finished_daughter_a_changed_one(copied: Workspace) -> None:
    assert other_than_finished() == {}
    assert set(other_than_finished("tuning.rank=8").values()) == {"tuning.rank: 4 -> 8"}
    assert set(other_than_finished("run.steps=7").values()) == {"run.steps: 2 -> 7"}
    assert other_than_finished("tuning.rank=8", "run.accept_changes=[tuning.rank]") == {}
    assert other_than_finished("run.save_every=1", "report.progress=never", "memory.zero_stage=2") == {}
    # The same rows spelled in another way are the same; rows that are gone are no new ones.
    rows = copied.folder / "people" / "bert" / "train.jsonl"
    rows.write_text(rows.read_text().replace(", ", ",  "))
    (copied.folder / "people" / "anna" / "train.jsonl").unlink()
    (copied.folder / "people" / "eva").mkdir()
    assert other_than_finished() == {}
    rows.write_text("\n".join(rows.read_text().splitlines()[1:]) + "\n")
    assert other_than_finished() == {"bert": "people/bert holds other rows"}
