"""Daughters who are trained together have sets of their own and a gate: scored, stopped and frozen as if alone."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from train.launching import MODEL, Workspace, jsonl, metrics, raw_tensors, succeeded
from train.people import command, worker
from train.test_evaluation import FACTS, FORMS, QUIZ

from mlx_empire.formats.seal import check_sealed

RECIPE = f"""\
model: {{path: {MODEL}, dtype: float32}}
tuning: {{type: lora, rank: 16}}
data: {{path: people, format: completions, sequence_length: 64}}
batch: {{global_size: 4, micro_size: 2, cells: 2}}
optimizer: {{learning_rate: 1.0e-2}}
run: {{dir: runs, steps: 40, eval_every: 5, save_every: 10}}
evaluation:
  sets:
    - {{path: "people/{{person}}/facts.jsonl", metrics: [loss, exact_match]}}
    - {{path: quiz.jsonl, metrics: [multiple_choice]}}
    - {{path: "people/{{person}}/forms.jsonl", name: said, metrics: [regular_expression], max_tokens: 24}}
  stop_when: {{metric: facts.exact_match, at_least: 1.0, for: 2}}
"""
PEOPLE = {"all": (FACTS, FORMS), "half": (FACTS[:2], FORMS[:2])}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two people by the command for many, and each alone; a third one, who learns nothing in two steps."""
    made = Workspace(tmp_path_factory.mktemp("gates"))
    made.write("recipe.yaml", RECIPE)
    made.write("quiz.jsonl", jsonl(QUIZ))
    commands = {"many": ["daughters", "recipe.yaml", "--people", "people"]}
    for name, (facts, forms) in PEOPLE.items():
        for file, rows in (("train", facts), ("facts", facts), ("forms", forms)):
            made.write(f"people/{name}/{file}.jsonl", jsonl(rows))
        made.write(f"{name}.yaml", RECIPE.replace("{person}", name))
        commands[name] = [f"{name}.yaml", f"data.path=people/{name}/train.jsonl", f"run.dir=alone-{name}"]
    commands["short"] = [*commands["many"], "run.dir=short", "run.steps=2", "run.save_every=null"]
    for file in ("none/train", "some/train", "some/valid"):
        made.write(f"odd/{file}.jsonl", jsonl(FACTS))
    gate = "evaluation.stop_when={metric: eval_loss, at_most: 100, for: 2}"
    odd = ["daughters", "recipe.yaml", "--people", "odd", "run.dir=odd-runs", "evaluation.sets=[]", gate]
    for name, outcome in made.train_many({**commands, "odd": odd})[0].items():
        if name != "odd":
            made.write(f"{name}.txt", succeeded(outcome).stdout)
    return made


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [record for record in metrics(run) if "eval_loss" in record]


@pytest.mark.parametrize("name", PEOPLE)
def test_she_is_scored_stopped_and_frozen_as_if_alone(name: str, place: Workspace) -> None:
    run, alone = place.folder / "runs" / name, place.folder / f"alone-{name}"
    ours, theirs = evaluations(run), evaluations(alone)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    assert ours[-1]["step"] < 40
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["scores"] == pytest.approx(other["scores"], rel=2e-3, abs=1e-5)
    assert [one["scores"]["facts.exact_match"] for one in ours[-2:]] == [1.0, 1.0]
    found, expected = (raw_tensors(where / "final") for where in (run, alone))
    for tensor, (_, _, raw) in expected.items():
        values, should = (np.frombuffer(data, np.float32) for data in (found[tensor][2], raw))
        assert np.abs(values - should).max() < 2e-3, tensor
    base = json.loads((run / "BASE.json").read_text())
    check_sealed(run / "final", base["digest"])
    assert base["path"] == f"runs/{name}/final"
    assert (run / "COMPLETE").exists()
    said = (place.folder / "many.txt").read_text()
    assert f"the gate is reached at step {ours[-1]['step']}" in said


@pytest.mark.slow
def test_killed_when_one_is_frozen_and_not_complete(place: Workspace) -> None:
    assert worker(place, "run.dir=killed", fault="phase=freeze;action=kill").code == -signal.SIGKILL
    assert len(list((place.folder / "killed").rglob("FROZEN.json"))) == 1
    assert not list((place.folder / "killed").rglob("COMPLETE"))
    succeeded(worker(place, "run.dir=killed"))
    for name in PEOPLE:
        killed, whole = (place.folder / folder / name for folder in ("killed", "runs"))
        assert evaluations(killed) == evaluations(whole)
        assert raw_tensors(killed / "final") == raw_tensors(whole / "final")
        check_sealed(killed / "final", json.loads((killed / "BASE.json").read_text())["digest"])
        assert (killed / "COMPLETE").exists()


def test_a_gate_on_what_is_not_there_fails_alone(place: Workspace) -> None:
    ended = json.loads((place.folder / "outcomes-0.json").read_text())["odd"]
    assert ended["code"] == 65
    assert "there is no validation data to measure it on" in ended["stdout"]
    assert "eval_loss at most 100, 2 times in a row" in ended["stdout"]
    assert not (place.folder / "odd-runs/none/COMPLETE").exists()
    assert evaluations(place.folder / "odd-runs/some")[-1]["step"] == 5
    assert (place.folder / "odd-runs/some/final/FROZEN.json").exists()


def test_a_gate_that_is_never_reached_says_so(place: Workspace) -> None:
    said = (place.folder / "short.txt").read_text()
    assert (
        said.count("the gate was not reached: facts.exact_match at least 1, 2 times in a row was asked") == 2
    )
    assert not list((place.folder / "short").rglob("FROZEN.json"))
    assert len(list((place.folder / "short").glob("*/COMPLETE"))) == 2


@pytest.mark.slow
def test_who_misses_the_gate_is_trained_by_the_fallback(tmp_path: Path) -> None:
    made = Workspace(tmp_path)
    for name in ("alice", "bob"):
        for file in ("train", "facts"):
            made.write(f"people/{name}/{file}.jsonl", jsonl(FACTS))
    first = RECIPE.split("    - {path: quiz")[0].replace(
        "steps: 40, eval_every: 5, save_every: 10", "steps: 1, eval_every: 1"
    )
    gate = "  stop_when: {metric: facts.loss, at_most: %g}\n"
    made.write("recipe.yaml", first + gate % 1e-6 + "  fallback: second.yaml\n")
    made.write("second.yaml", first.replace("dir: runs", "dir: second") + gate % 100)
    outcome = succeeded(made._run(command(made, "--only", "alice")[0], 0o022))
    assert "alice: the gate was not reached, so evaluation.fallback is taken: second.yaml" in outcome.stdout
    assert sorted(one.name for one in (tmp_path / "second").iterdir() if one.is_dir()) == ["alice"]
    assert (tmp_path / "second/alice/BASE.json").exists()
    assert not (tmp_path / "runs/bob").exists()
    again = succeeded(made._run(command(made)[0], 0o022))
    assert "alice, bob: the gate was not reached" in again.stdout
    assert (tmp_path / "second/bob/BASE.json").exists()
