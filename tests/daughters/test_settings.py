"""Which settings a sweep tries, when it compares them, and what it refuses in one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.rows import MODEL

from mlx_empire.cli import main as cli
from mlx_empire.daughters import machine
from mlx_empire.daughters.settings import divided, groups_of, rungs_of, settings_of
from mlx_empire.daughters.sweep import SettingsAsJobs
from mlx_empire.daughters.watch import refuse_unwatchable
from mlx_empire.errors import UserError
from mlx_empire.recipe.load import parse_recipe
from mlx_empire.recipe.schema import Recipe

RECIPE = f"""
model: {{path: {MODEL}}}
tuning: {{type: lora}}
data: {{path: rows, format: tokens, sequence_length: 64}}
batch: {{global_size: 2, micro_size: 1}}
optimizer: {{learning_rate: 5.0e-3}}
run: {{dir: swept, steps: 8}}
"""


def test_every_combination_has_a_recipe_and_a_folder_of_its_own() -> None:
    changes, swept = divided(["learning_rate=1e-4,2e-4", "run.steps=5", "rank=8", "schedule.warmup=1,2"])
    assert changes == ["run.steps=5"]
    made = settings_of(parse_recipe(RECIPE, "r", changes), swept)
    assert [
        (s.recipe.optimizer.learning_rate, s.recipe.tuning.rank, s.recipe.run.dir.name) for s in made[::2]
    ] == [
        (1e-4, 8, "learning_rate=1e-4,rank=8,warmup=1"),
        (2e-4, 8, "learning_rate=2e-4,rank=8,warmup=1"),
    ]
    assert {str(s.recipe.run.dir.parent) for s in made} == {"swept"}
    assert {int(s.recipe.run.steps.value) for s in made} == {5}


def test_settings_share_a_trainer_where_only_the_rate_differs() -> None:
    _, swept = divided(["learning_rate=1e-4,2e-4", "rank=2,4"])
    groups = groups_of(settings_of(parse_recipe(RECIPE, "r"), swept))
    assert [[one.recipe.tuning.rank for one in group] for group in groups] == [[2, 2], [4, 4]]


@pytest.mark.parametrize(
    ("count", "steps", "keep", "rungs"),
    [
        (6, 8, 2, [(2, 3), (4, 2), (8, 2)]),
        (9, 90, 3, [(10, 3), (30, 1), (90, 1)]),
        (2, 100, 3, [(100, 2)]),
        (8, 3, 2, [(1, 4), (3, 4)]),
    ],
)
def test_the_last_comparisons_are_at_parts_of_the_whole_run(
    count: int, steps: int, keep: int, rungs: list[tuple[int, int]]
) -> None:
    assert rungs_of(count, steps, keep) == rungs


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing is swept; name keys with their values"),
        (["path=a,b"], "path: cannot be swept; keys of tuning, optimizer, schedule can, and run.seed"),
        (["type=lora,dora"], "type: may be tuning.type or schedule.type"),
        (["rank=8,8"], "two settings are the same; list each value once"),
        (["rank=8"], "1 settings: a sweep compares 2 to 256"),
        (["rank=,"], "rank: no value; list some"),
        (["rank=2", "tuning.rank=4,5"], "tuning.rank: named twice"),
        (["rank=8,x"], "tuning.rank"),
    ],
)
def test_what_cannot_be_swept_is_refused(words: list[str], said: str) -> None:
    def tried() -> None:
        changes, swept = divided(words)
        settings_of(parse_recipe(RECIPE, "r", changes), swept)

    with pytest.raises(UserError) as caught:
        tried()
    assert said in str(caught.value)


def test_another_sweep_in_the_same_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    Path("rows").mkdir()
    for name in ("train", "valid"):
        Path(f"rows/{name}.jsonl").write_text(json.dumps({"tokens": [1, 2, 3]}) + "\n")
    Path("swept").mkdir()
    Path("swept/sweep.json").write_text(json.dumps({"rungs": [{"step": 8, "go_on": 2}], "settings": []}))
    with pytest.raises(SystemExit) as ended:
        cli(["sweep", "recipe.yaml", "rank=2,4"])
    assert ended.value.code == 64
    assert "swept/sweep.json: is of another sweep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rank=2,4"], "rows: nothing is held out to compare by; add a valid.jsonl"),
        (["rank=2,4", "--by", "x.loss"], "--by: x.loss: is not measured; there are eval_loss"),
        (
            [
                "rank=2,4",
                "run.eval_every=4",
                "evaluation.stop_when={metric: eval_loss, at_most: 1}",
                "evaluation.fallback=x.yaml",
            ],
            "evaluation.fallback: x.yaml: a sweep takes its best setting; leave it out",
        ),
        (["rank=2,4", "--keep", "1"], "--keep: 1: expected a whole number from 2 to 100"),
        (
            ["rank=2,4", "model.dtype=float16"],
            "model.dtype: float16: every daughter would need a loss scale of its own",
        ),
    ],
)
def test_a_sweep_that_cannot_be_is_one_line(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    Path("rows").mkdir()
    Path("rows/train.jsonl").write_text(json.dumps({"tokens": [1, 2, 3]}) + "\n")
    with pytest.raises(SystemExit) as ended:
        cli(["sweep", "recipe.yaml", *words])
    assert ended.value.code == 64
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_a_fallback_has_no_meaning_with_watch() -> None:
    gate = ["run.eval_every=4", "evaluation.stop_when={metric: eval_loss, at_most: 1}"]
    recipe = parse_recipe(RECIPE, "r", [*gate, "evaluation.fallback=x.yaml"])
    with pytest.raises(
        UserError, match=r"^evaluation\.fallback: x\.yaml: with --watch what was in use stays so"
    ):
        refuse_unwatchable(recipe)
    refuse_unwatchable(parse_recipe(RECIPE, "r", gate))


@pytest.fixture
def swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep that has come to its end; nothing is trained, but for a record of each setting."""

    def finish(recipe: Recipe, jobs: SettingsAsJobs, names: Sequence[str], *_: object) -> list[str]:
        for name in names:
            folder = jobs.of(name).run.dir
            folder.mkdir(parents=True)
            (folder / "metrics.jsonl").write_text('{"step": 8, "eval_loss": 2.0}\n')
            (folder / "COMPLETE").write_text("\n")
        return []

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "train_adapters", finish)
    monkeypatch.setattr(machine, "capacity_for", lambda *_: None)
    Path("recipe.yaml").write_text(RECIPE)
    Path("rows").mkdir()
    for split in ("train", "valid"):
        Path(f"rows/{split}.jsonl").write_text('{"tokens": [1, 2, 3, 4]}\n')
    assert cli(["sweep", "recipe.yaml", *SWEEP]) == 0
    return tmp_path


SWEEP = ["learning_rate=1e-4,2e-4", "--keep", "3"]


def test_a_sweep_of_other_rows_recipe_or_questions_does_not_tell_the_old_scores(
    swept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def given(*words: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli(["sweep", "recipe.yaml", *SWEEP, *words])
        said = capsys.readouterr()
        assert (ended.value.code, said.err.count("\n"), "the best" in said.out) == (64, 1, False)
        return said.err

    assert cli(["sweep", "recipe.yaml", *SWEEP]) == 0, "the same goes on"
    assert "optimizer.weight_decay: 0.0 -> 0.2" in given("optimizer.weight_decay=0.2")
    sets = "evaluation.sets=[{path: rows/valid.jsonl, metrics: [loss]}]"
    assert "evaluation.sets: settings were compared by another one" in given(sets, "run.eval_every=4")
    Path("rows/valid.jsonl").write_text('{"tokens": [4, 3, 2, 1]}\n')
    said = given()
    assert "data.path: rows holds other rows than the run began with" in said
    assert said.endswith("add run.accept_changes=[data.path], or choose another run.dir\n")
    assert cli(["sweep", "recipe.yaml", *SWEEP, "run.accept_changes=[data.path]"]) == 0


def test_a_sweep_whose_sets_hold_other_questions_does_not_tell_the_old_scores(
    swept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("asked.jsonl").write_text('{"tokens": [1, 2, 3]}\n')
    sets = "evaluation.sets=[{path: asked.jsonl, metrics: [loss]}]"
    words = ["sweep", "recipe.yaml", *SWEEP, "--by", "eval_loss", "run.dir=other", "run.eval_every=4", sets]
    assert [cli(words), cli(words)] == [0, 0]
    Path("asked.jsonl").write_text('{"tokens": [3, 2, 1]}\n')
    with pytest.raises(SystemExit) as ended:
        cli(words)
    assert ended.value.code == 64
    assert "evaluation.sets: asked.jsonl holds other questions than settings were" in capsys.readouterr().err
    assert cli([*words, "run.accept_changes=[evaluation.sets]"]) == 0


@pytest.mark.parametrize(
    ("file", "holds"),
    [
        ("asked/train.jsonl", "holds other questions than"),
        ("asked/train.jsonl renamed", "is gone, and held questions that"),
        ("answer.json", "holds other questions than"),
        ("judge.py", "holds other code than"),
    ],
)
def test_a_sweep_whose_folder_of_questions_schema_or_scorer_is_another_does_not_tell_the_old_scores(
    file: str, holds: str, swept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("asked").mkdir()
    for name in ("asked/train.jsonl", "answer.json", "judge.py"):
        Path(name).write_text("{}\n")
    one = "{path: asked, metrics: [json_schema, scorer], schema: answer.json, scorer: judge.py:judge}"
    sets = f"evaluation.sets=[{one}]"
    words = ["sweep", "recipe.yaml", *SWEEP, "--by", "eval_loss", "run.dir=other", "run.eval_every=4", sets]
    assert [cli(words), cli(words)] == [0, 0]
    file, _, renamed = file.partition(" ")
    if renamed:
        Path(file).rename("asked/train-00000-of-00001.jsonl")
    else:
        Path(file).write_text("{ }\n")
    with pytest.raises(SystemExit) as ended:
        cli(words)
    assert ended.value.code == 64
    assert f"evaluation.sets: {file} {holds} settings were compared by" in capsys.readouterr().err
    assert cli([*words, "run.accept_changes=[evaluation.sets]"]) == 0
