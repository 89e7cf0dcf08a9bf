"""Scores of the streamed multiple choice tasks against those of EleutherAI's lm-eval, run by itself on torch.

lm-eval, transformers and torch are asked of another interpreter, which LM_EVAL_PYTHON names, for they want other
versions of what is installed here: `make test-interop` makes it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.mpi import ROOT
from train.launching import MODEL

from mlx_empire.recipe.evaluation import TASKS

PYTHON = os.environ.get("LM_EVAL_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="LM_EVAL_PYTHON is not set: run `make test-interop`")
WORKER = Path(__file__).with_name("lm_eval_worker.py")
ROWS = 12
OF_STORIES = (
    "the a little girl boy dog cat bird ball red blue big happy sad ran saw liked jumped sat played went found home "
    "park tree water sun rain mom friend and to in with one day very was"
)
WORDS = OF_STORIES.split()


def text(chance: random.Random, least: int = 3, most: int = 9) -> str:
    return " ".join(chance.choices(WORDS, k=chance.randint(least, most)))


def lettered(chance: random.Random) -> dict[str, Any]:
    return {"text": [text(chance) for _ in range(4)], "label": list("ABCD")}


MADE: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "arc_challenge": lambda c: {
        "question": f"{text(c)}?",
        "choices": lettered(c),
        "answerKey": c.choice("ABCD"),
    },
    "arc_easy": lambda c: {"question": f"{text(c)}?", "choices": lettered(c), "answerKey": c.choice("ABCD")},
    "boolq": lambda c: {
        "passage": f"{text(c, 9, 20)}.",
        "question": text(c),
        "label": c.randrange(2),
    },
    "copa": lambda c: {
        "premise": f"{text(c)}. ",
        "choice1": f"{text(c).capitalize()}.",
        "choice2": f"{text(c).capitalize()}.",
        "question": c.choice(("cause", "effect")),
        "label": c.randrange(2),
    },
    "hellaswag": lambda c: {
        "activity_label": text(c, 1, 2).capitalize(),
        "ctx_a": f"{text(c)} [title]  {text(c)}.",
        "ctx_b": text(c, 1, 3),
        "endings": [f"{text(c)} [step] {text(c, 1, 2)}." for _ in range(4)],
        "label": str(c.randrange(4)),
    },
    "mmlu": lambda c: {
        "question": f" {text(c)}?",
        "choices": [text(c) for _ in range(4)],
        "answer": c.randrange(4),
        "subject": "abstract_algebra",
    },
    "openbookqa": lambda c: {
        "question_stem": text(c),
        "choices": lettered(c),
        "answerKey": c.choice("ABCD"),
    },
    "piqa": lambda c: {
        "goal": f"{text(c)}.",
        "sol1": text(c),
        "sol2": text(c),
        "label": c.randrange(2),
    },
    "sciq": lambda c: {
        "support": f" {text(c, 9, 20)}.",
        "question": f"{text(c)}?",
        **{f"distractor{n}": text(c, 1, 3) for n in (1, 2, 3)},
        "correct_answer": text(c, 1, 3),
    },
    "winogrande": lambda c: {
        "sentence": f"{text(c)} _ {text(c)}.",
        "option1": text(c, 1, 2),
        "option2": text(c, 1, 2),
        "answer": c.choice("12"),
    },
}


def accuracies(ours: dict[str, Any]) -> dict[str, float]:
    """By task, from what the command wrote."""
    return {one["name"].removesuffix(".multiple_choice"): one["after"] for one in ours["scores"]}


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """(ours by the command that a user types, theirs by the harness) on the same rows and weights."""
    folder = tmp_path_factory.mktemp("lm-eval")
    model = Path(os.environ.get("LM_EVAL_MODEL", MODEL)).resolve()
    for name in TASKS:
        chance = random.Random(name)
        rows = [json.dumps(MADE[name](chance)) for _ in range(ROWS)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    line = [sys.executable, "-m", "mlx_empire", "evaluate", str(model), "--tasks", ",".join(TASKS)]
    line += ["--tasks-from", str(folder), "--json", str(folder / "ours.json"), "data.sequence_length=512"]
    line += ["model.dtype=float32"]
    subprocess.run(line, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=900)
    theirs = [PYTHON, str(WORKER), str(model), str(folder), str(folder / "theirs.json"), *TASKS]
    plain = {key: value for key, value in os.environ.items() if key not in ("LD_PRELOAD", "PYTHONPATH")}
    subprocess.run(theirs, cwd=folder, env={**plain, "HF_HOME": str(folder / "hf")}, check=True, timeout=900)
    ours, other = (json.loads((folder / f"{who}.json").read_text()) for who in ("ours", "theirs"))
    return ours, other


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_the_accuracy_that_lm_eval_gives_it(
    task: str, scored: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    """Row by row. Where two choices are equally likely to 1e-3 either may be the likeliest."""
    ours, theirs = scored
    right = [row["values"]["multiple_choice"] for row in ours["rows"][task]]
    told = theirs[task]
    assert len(right) == len(told["right"]) == ROWS
    near = [sorted(values)[-1] - sorted(values)[-2] < 1e-3 for values in told["likely"]]
    assert sum(near) <= 1
    assert [r for r, tie in zip(right, near, strict=True) if not tie] == [
        r for r, tie in zip(told["right"], near, strict=True) if not tie
    ]
    if not any(near):
        assert accuracies(ours)[task] == pytest.approx(told["acc"], abs=1e-12)


def test_the_rows_tell_models_apart(scored: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Otherwise the accuracies could agree by chance."""
    found = accuracies(scored[0])
    print(found)  # for docs/daughters.md
    assert len(set(found.values())) > 3
