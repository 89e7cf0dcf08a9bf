"""What a run writes lies apart from what it reads: said in one line by every verb that would write, before it does."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from train.launching import MODEL, RECIPE, SPEECHES, Workspace

from mlx_empire.errors import UserError
from mlx_empire.launch.command import main as launch
from mlx_empire.recipe.load import load_recipe
from mlx_empire.run.apart import refuse_mixed, refuse_recipe

ADAPTERS = "tuning.type=lora"
CASES = {  # the override, and how its folder lies to what
    "run.dir=model": "is model.path",
    "run.dir=model/runs/1": "lies inside model.path",
    "run.dir=.": "lies above model.path",
    "run.dir=link": "is model.path",
    "run.dir=elsewhere/../link/new": "lies inside model.path",
    "run.dir=rows": "is data.path",
    "run.dir=rows/new": "lies inside data.path",
    "run.dir=rows/train.jsonl/new": "lies inside data.path",
    "run.dir=earlier": "is tuning.start",
    "run.dir=earlier/more": "lies inside tuning.start",
    "run.checkpoints=model": "is model.path",
    "run.checkpoints=model/{host}/{rank}": "lies inside model.path",
    "run.checkpoints=rows": "is data.path",
}
APART = ("run.dir=models", "run.dir=model-2", "run.dir=earlier.more", "run.checkpoints=disk/{rank}")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A model, rows and an earlier adapter in a folder with a recipe that names them."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MODEL, "model")
    shutil.copytree(SPEECHES, "rows")
    os.symlink("model", "link")
    for name in ("elsewhere", "earlier"):
        Path(name).mkdir()
    made = Workspace(tmp_path)
    made.write("mine.yaml", RECIPE.replace(str(MODEL), "model").replace(str(SPEECHES), "rows"))
    return made


def listing(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("word", CASES)
def test_a_run_is_refused_whose_folder_is_in_or_around_what_it_reads(here: Workspace, word: str) -> None:
    words = [word, ADAPTERS, "tuning.start=earlier"] + ["data.path=rows/train.jsonl"] * (
        "train.jsonl" in word
    )
    with pytest.raises(UserError) as refused:
        refuse_mixed(load_recipe(Path("mine.yaml"), words), 0, "king")
    said = str(refused.value)
    assert said.startswith(f"{word.partition('=')[0]}: ")
    assert f" {CASES[word]} (" in said
    assert "choose a folder beside it" in said


@pytest.mark.parametrize("word", APART)
def test_a_name_that_begins_alike_is_another_folder(here: Workspace, word: str) -> None:
    refuse_mixed(load_recipe(Path("mine.yaml"), [word, ADAPTERS, "tuning.start=earlier"]), 0, "king")


def test_of_several_sources_each_counts(here: Workspace) -> None:
    words = [
        "data.path=null",
        "data.sources=[{path: other, weight: 1}, {path: rows, weight: 1}]",
        "run.dir=rows",
    ]
    with pytest.raises(UserError, match=r"run\.dir: rows is data\.sources \(rows\)"):
        refuse_mixed(load_recipe(Path("mine.yaml"), words), 0, "king")


def test_a_recipe_is_not_replaced_by_its_resolved_form_but_a_run_goes_on_by_that(here: Workspace) -> None:
    path = here.write("new/recipe.yaml", (here.folder / "mine.yaml").read_text())
    recipe = load_recipe(path, ["run.dir=./new"])
    with pytest.raises(
        UserError, match=r"run\.dir: new: a run writes its resolved recipe to .*new/recipe\.yaml"
    ):
        refuse_recipe(recipe, path)
    refuse_recipe(recipe, Path("mine.yaml"))
    here.write("new/plan.json", "{}")
    refuse_recipe(recipe, path)


def test_every_verb_that_would_write_says_so_first(
    here: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(here.folder)
    outcomes = here.train_many({w: ["mine.yaml", f"run.dir={w}"] for w in ("model", "rows")}, ranks=2)
    dry = here.train_many({"dry": ["mine.yaml", "run.dir=model", "--dry-run"]})[0]["dry"]
    for name, outcome in {**outcomes[0], "dry": dry}.items():
        said = "rows is data.path" if name == "rows" else "model is model.path"
        assert (outcome.code, len(outcome.said)) == (64, 1), outcome.stderr
        assert outcome.said[0].startswith(f"run.dir: {said}")
    with pytest.raises(SystemExit) as ended:
        launch(["mine.yaml", "--hosts", "nobody", "run.dir=model"])
    assert ended.value.code == 64
    assert "run.dir: model is model.path" in capsys.readouterr().err
    after = {
        path: at
        for path, at in listing(here.folder).items()
        if Path(path).name[:8] not in ("commands", "outcomes")
    }
    assert after == before


def test_the_rank_is_named_whose_checkpoints_alone_would_lie_there(here: Workspace) -> None:
    shutil.move(here.folder / "model", here.folder / "kept/1")
    outcome = here.train("mine.yaml", "model.path=kept/1", "run.checkpoints=kept/{rank}", ranks=2)
    assert outcome.code == 64
    assert len(outcome.said) == 1
    assert outcome.said[0].startswith("rank 1 on ")
    assert "run.checkpoints: kept/1 is model.path (kept/1)" in outcome.said[0]
    assert not (here.folder / "kept/0").exists()
