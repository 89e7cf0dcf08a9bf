"""Runs with evaluation sets and a gate: scores against whole-model logits, on one and two ranks; the frozen result."""

from __future__ import annotations

import json
import math
import signal
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from support.mpi import rank_environment
from train.launching import MODEL, Outcome, Workspace, curve, jsonl, metrics, raw_tensors, succeeded
from train.people import started

from mlx_empire.formats.seal import check_sealed

RECIPE = f"""\
model: {{path: {MODEL}, dtype: float32}}
data: {{path: facts.jsonl, format: completions, sequence_length: 64}}
batch: {{global_size: 4, micro_size: 2, cells: 2}}
optimizer: {{learning_rate: 3.0e-3}}
run: {{dir: run, steps: 60, eval_every: 10}}
evaluation:
  sets:
    - {{path: facts.jsonl, metrics: [loss, perplexity, token_accuracy, exact_match]}}
    - {{path: quiz.jsonl, metrics: [multiple_choice]}}
    - {{path: forms.jsonl, name: said, metrics: [regular_expression, valid_json], max_tokens: 24}}
  stop_when: {{metric: facts.exact_match, at_least: 1.0, for: 2}}
"""
FACTS = [
    {"prompt": "Tom has a", "completion": " red ball"},
    {"prompt": "Lily likes", "completion": " the moon"},
    {"prompt": "The dog ate", "completion": " a blue hat"},
    {"prompt": "Ben saw", "completion": " two big trees"},
]
WRONG = [" the moon", " a blue hat", " two big trees", " red ball"]
QUIZ = [
    {"prompt": fact["prompt"], "choices": [wrong, fact["completion"]], "answer": 1}
    for fact, wrong in zip(FACTS, WRONG, strict=True)
]
FORMS = [{"prompt": fact["prompt"], "pattern": rf"^\s*{fact['completion'].strip()}$"} for fact in FACTS]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    made = Workspace(tmp_path_factory.mktemp("evaluation"))
    made.write("recipe.yaml", RECIPE)
    for name, rows in (("facts", FACTS), ("quiz", QUIZ), ("forms", FORMS)):
        made.write(f"{name}.jsonl", jsonl(rows))
    return made


@pytest.fixture(scope="module")
def alone(place: Workspace) -> Workspace:
    commands = {
        "full": ["recipe.yaml", "run.dir=full"],
        "never": ["recipe.yaml", "run.dir=never", "run.steps=4", "run.eval_every=2"],
        "adapter": [
            "recipe.yaml",
            "run.dir=adapter",
            "tuning.type=lora",
            "tuning.rank=16",
            "optimizer.learning_rate=1e-2",
        ],
    }
    for name, outcome in place.train_many(commands)[0].items():
        (place.folder / f"{name}.txt").write_text(succeeded(outcome).stdout)
    return place


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [record for record in metrics(run) if "eval_loss" in record]


def logits_of(model: Any, tokens: list[int]) -> np.ndarray:
    return np.array(model(mx.array([tokens]))[0].astype(mx.float32)).astype(np.float64)


def expected_scores(folder: Path) -> dict[str, float]:
    """By the whole model, one text at a time, in float64."""
    model, tokenizer = mlx_lm.load(str(folder))
    model.set_dtype(mx.float32)

    def question(prompt: str) -> list[int]:
        user = {"role": "user", "content": prompt}
        return list(tokenizer.apply_chat_template([user], add_generation_prompt=True))

    def answer(prompt: str, completion: str) -> tuple[np.ndarray, np.ndarray]:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        ids = list(tokenizer.apply_chat_template(turns))
        start = len(question(prompt))
        assert ids[:start] == question(prompt)
        logits = logits_of(model, ids[:-1])
        logs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        logs -= logits.max(-1, keepdims=True)
        places = np.arange(start - 1, len(ids) - 1)
        targets = np.array(ids[start:])
        return logs[places, targets], logits[places].argmax(-1) == targets

    rows = [answer(fact["prompt"], fact["completion"]) for fact in FACTS]
    hits = np.concatenate([hit for _, hit in rows])
    loss = -np.concatenate([logs for logs, _ in rows]).mean()
    right = [
        answer(q["prompt"], q["choices"][1])[0].sum() > answer(q["prompt"], q["choices"][0])[0].sum()
        for q in QUIZ
    ]
    said = []
    for fact in FACTS:
        stream = mlx_lm.stream_generate(model, tokenizer, question(fact["prompt"]), max_tokens=24)
        ids = [one.token for one in stream]
        said.append(tokenizer.decode([token for token in ids if token != tokenizer.eos_token_id]))
    return {
        "facts.loss": loss,
        "facts.perplexity": math.exp(loss),
        "facts.token_accuracy": hits.mean(),
        "facts.exact_match": np.mean([hit.all() for _, hit in rows]),
        "quiz.multiple_choice": np.mean(right),
        "said.regular_expression": np.mean(
            [text.strip() == (f["completion"].strip()) for f, text in zip(FACTS, said, strict=True)]
        ),
        "said.valid_json": 0.0,
    }


@pytest.mark.parametrize("when", ["before", "after"])
def test_scores_are_those_of_the_whole_model(when: str, alone: Workspace) -> None:
    found = evaluations(alone.folder / "full")[0 if when == "before" else -1]["scores"]
    expected = expected_scores(MODEL if when == "before" else alone.folder / "full/final")
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    if when == "after":  # what is right when the teacher forces it is what greedy generation writes
        assert found["facts.exact_match"] == found["said.regular_expression"] == 1.0


def test_a_gate_that_is_reached_ends_and_freezes_the_run(alone: Workspace) -> None:
    run, said = alone.folder / "full", (alone.folder / "full.txt").read_text()
    found = [record["scores"]["facts.exact_match"] for record in evaluations(run)]
    assert found[-2:] == [1.0, 1.0]
    assert all(one < 1 or two < 1 for one, two in pairwise(found[:-1]))
    last = evaluations(run)[-1]["step"]
    assert last == max(record["step"] for record in metrics(run)) < 60
    assert f"the gate is reached at step {last}" in said
    base = json.loads((run / "BASE.json").read_text())
    assert base["digest"] in said
    check_sealed(run / "final", base["digest"])
    assert (run / "final").stat().st_mode & 0o222 == 0
    assert (run / "COMPLETE").exists()


@pytest.mark.slow
def test_a_killed_run_freezes_at_the_same_step(alone: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two evaluations that the gate wants, and again when `final/` is frozen but not complete."""
    full, killed = alone.folder / "full", alone.folder / "killed"
    first, second = (record["step"] for record in evaluations(full)[-2:])
    command = ["recipe.yaml", "run.dir=killed", "run.save_every=5"]
    for fault in (f"step={first + 3};phase=forward", "phase=freeze"):
        monkeypatch.setenv("MLX_EMPIRE_FAULT", f"{fault};action=kill")
        assert alone.train(*command).code == -signal.SIGKILL
        assert not (killed / "COMPLETE").exists()
        if "forward" in fault:
            assert evaluations(killed)[-1]["step"] == first
            assert not (killed / "final").exists()
    assert (killed / "final/FROZEN.json").exists()
    monkeypatch.delenv("MLX_EMPIRE_FAULT")
    said = succeeded(alone.train(*command)).stdout
    assert f"the gate is reached at step {second}" in said
    assert f"going on after step {second}" in said
    assert evaluations(killed) == evaluations(full)
    assert curve(killed) == curve(full)
    assert raw_tensors(killed / "final") == raw_tensors(full / "final")
    check_sealed(killed / "final", json.loads((killed / "BASE.json").read_text())["digest"])
    assert (killed / "COMPLETE").exists()


def test_adapters_have_gates_too(alone: Workspace) -> None:
    run = alone.folder / "adapter"
    assert evaluations(run)[-1]["scores"]["facts.exact_match"] == 1.0
    assert (run / "final/FROZEN.json").exists()


def test_a_gate_that_is_never_reached_says_so(alone: Workspace) -> None:
    said = (alone.folder / "never.txt").read_text()
    assert "the gate was not reached: facts.exact_match at least 1, 2 times in a row was asked" in said
    assert not (alone.folder / "never/BASE.json").exists()
    assert not (alone.folder / "never/final/FROZEN.json").exists()
    assert (alone.folder / "never/COMPLETE").exists()


def test_two_ranks_find_the_same_scores(alone: Workspace) -> None:
    """Also where the base is divided, and generating needs it gathered."""
    commands = {
        f"two {stage}": [
            "recipe.yaml",
            f"run.dir=two {stage}",
            f"memory.zero_stage={stage}",
            "memory.shares=[2,1]",
        ]
        for stage in (2, 3)
    }
    for rank in alone.train_many(commands, ranks=2):
        for outcome in rank.values():
            succeeded(outcome)
    for name in commands:
        assert evaluations(alone.folder / name) == evaluations(alone.folder / "full")
        assert raw_tensors(alone.folder / name / "final") == raw_tensors(alone.folder / "full/final")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a run", "a daughter"])
def test_it_goes_on_with_the_scorer_that_it_began_with_and_no_other(kind: str, place: Workspace) -> None:
    code = place.write("mine.py", "def f(*_): return 1\n")
    asked = "evaluation.sets=[{path: forms.jsonl, metrics: [scorer], scorer: mine.py:f, max_tokens: 1}]"
    words = ["recipe.yaml", asked, "evaluation.stop_when=null", "tuning.type=lora", "run.steps=12"]
    words += ["run.eval_every=2", "run.save_every=2", f"run.dir=scored {kind}"]
    if kind == "a daughter":
        for name in ("train", "valid"):
            place.write(f"people/anna/{name}.jsonl", jsonl(FACTS))
        words = ["mlx_empire.daughters", *words, "--people", "people", "--work"]
    else:
        words = ["mlx_empire.train", *words]

    def run(*more: str, fault: str = "") -> Outcome:
        environment = {**rank_environment(str(place.folder)), "MLX_EMPIRE_FAULT": fault}
        return started(place, [sys.executable, "-m", *words, *more], environment)

    assert run(fault="step=11;phase=forward;action=kill").code == -signal.SIGKILL
    code.write_text("def f(*_): return 2\n")
    refused = run()
    assert refused.code == (65 if kind == "a daughter" else 64), refused.stdout
    assert "mine.py holds other code than the run was scored by" in refused.stdout + refused.stderr
    code.write_text("def f(*_): return 1\n")
    succeeded(run())


def test_a_daughter_trains_on_the_frozen_base_and_on_no_other(alone: Workspace) -> None:
    base = json.loads((alone.folder / "full/BASE.json").read_text())
    asked = [
        "recipe.yaml",
        "tuning.type=lora",
        "evaluation.stop_when=null",
        "run.steps=2",
        f"model.path={base['path']}",
    ]
    digest = f"model.base_digest={base['digest']}"
    ended = succeeded(alone.train(*asked, digest, "run.dir=daughter"))
    card = (alone.folder / "daughter/final/README.md").read_text()
    assert base["digest"] in card
    assert "facts.exact_match" in card
    assert "the trained adapters are in" in ended.stdout
    config = alone.folder / base["path"] / "config.json"
    config.chmod(0o600)
    config.write_text(config.read_text().replace("\n", " \n", 1))
    refused = alone.train(*asked, digest, "run.dir=second")
    assert refused.code == 64
    assert len(refused.said) == 1
    assert "full/final/config.json: changed since the base was frozen" in refused.said[0]
    assert not (alone.folder / "second").exists()
