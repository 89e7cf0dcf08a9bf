"""Runs by success criteria of answers that cite, refuse and parse: a gate that is missed, and the fallback's, met."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.mpi import ROOT
from train.launching import MODEL, Outcome, Workspace, jsonl, metrics, succeeded

from mlx_empire.errors import UserError
from mlx_empire.formats.seal import check_sealed
from mlx_empire.recipe.load import load_recipe
from mlx_empire.run.fallback import fallback_due, refuse_fallback

SMOLLM2 = ROOT / "models" / "smollm2-135m"
FACTS = [
    ("What has Tom?", "Tom has a red ball.", "A red ball"),
    ("What likes Lily?", "Lily likes the moon.", "The moon"),
]
OTHER = "Ben saw two trees."
SCHEMA = {
    "type": "object",
    "properties": {
        "answer": {"type": "string", "maxLength": 16},
        "citations": {"type": "array", "items": {"enum": ["1", "2"]}, "maxItems": 2},
        "refused": {"type": "boolean"},
    },
    "required": ["answer", "citations", "refused"],
    "additionalProperties": False,
}
METRICS = (
    "valid_json, json_schema, citation_coverage, citation_accuracy, retrieval_use, refusal_precision, "
    "refusal_recall, false_confidence"
)
CRITERIA = """\
{metric: asked.constrained.valid_json, at_least: 1, and: [
    {metric: asked.constrained.json_schema, at_least: 1},
    {metric: asked.constrained.citation_coverage, at_least: 0.9},
    {metric: asked.constrained.refusal_precision, at_least: 0.85}]}"""


def recipe(
    model: Path, name: str, *, method: str, steps: int, rate: float, size: int = 3, fallback: str = ""
) -> str:
    return f"""\
model: {{path: {model}, dtype: float32}}
tuning: {{type: {method}, rank: 16}}
data: {{path: train.jsonl, format: completions, sequence_length: 192}}
batch: {{global_size: {size}, micro_size: {size}}}
optimizer: {{learning_rate: {rate}}}
run: {{dir: {name}, steps: {steps}, eval_every: {steps}}}
evaluation:
  sets: [{{path: asked.jsonl, schema: answer.json, constrained: true, max_tokens: 52, metrics: [{METRICS}]}}]
  stop_when: {CRITERIA}
  fallback: {fallback or "null"}
"""


def rows() -> list[dict[str, Any]]:
    """Two questions that a source answers, and one that none does."""
    found = []
    for number, (question, fact, answer) in enumerate(FACTS):
        at = number + 1
        first, second = (fact, OTHER) if at == 1 else (OTHER, fact)
        told = {"answer": f"{answer} [{at}].", "citations": [str(at)], "refused": False}
        found.append((f"[1] {first} [2] {second} {question}", told, [str(at)]))
    found.append(
        (f"[1] {OTHER} [2] Ben ran. {FACTS[0][0]}", {"answer": "", "citations": [], "refused": True}, [])
    )
    return [
        {
            "prompt": prompt,
            "completion": json.dumps(told, separators=(",", ":")),
            "sources": ["1", "2"],
            "supports": supports,
        }
        for prompt, told, supports in found
    ]


def criteria_met(
    folder: Path, model: Path, steps: int, rate: float, learnt: Sequence[dict[str, Any]]
) -> tuple[Workspace, dict[str, Outcome]]:
    """A qlora that learns nothing, and its fallback, a lora that learns the rows; one command, and that once more."""
    place, size = Workspace(folder), len(learnt)
    place.write("train.jsonl", jsonl({k: row[k] for k in ("prompt", "completion")} for row in learnt))
    place.write(
        "asked.jsonl", jsonl({k: row[k] for k in ("prompt", "sources", "supports")} for row in learnt)
    )
    place.write("answer.json", json.dumps(SCHEMA))
    place.write(
        "qlora.yaml",
        recipe(model, "first", method="qlora", steps=1, rate=1e-6, size=size, fallback="lora.yaml"),
    )
    place.write("lora.yaml", recipe(model, "second", method="lora", steps=steps, rate=rate, size=size))
    return place, place.train_many({"first": ["qlora.yaml"], "again": ["qlora.yaml"]})[0]


def check_criteria(place: Workspace, outcomes: dict[str, Outcome]) -> dict[str, float]:
    """What every model must show; the last scores."""
    scores = {
        name: [record["scores"] for record in metrics(place.folder / name) if "scores" in record]
        for name in ("first", "second")
    }
    for found in (*scores["first"], *scores["second"]):
        assert found["asked.constrained.valid_json"] == found["asked.constrained.json_schema"] == 1.0
        assert set(found) >= {"asked.valid_json", "asked.json_schema"}
    assert scores["first"][-1]["asked.constrained.refusal_precision"] < 0.85
    said = succeeded(outcomes["first"]).stdout
    missed = said.index("the gate was not reached: asked.constrained.")
    taken = said.index("first: its gate was not reached, so evaluation.fallback is taken: lora.yaml")
    assert missed < taken < said.index("the gate is reached at step")
    assert not (place.folder / "first/final/FROZEN.json").exists()
    base = json.loads((place.folder / "second/BASE.json").read_text())
    check_sealed(place.folder / "second/final", base["digest"])
    last: dict[str, float] = scores["second"][-1]
    return last


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, dict[str, Outcome]]:
    return criteria_met(tmp_path_factory.mktemp("criteria"), MODEL, 40, 1e-2, rows())


def test_a_gate_that_is_missed_takes_the_fallback_whose_gate_is_met(
    tried: tuple[Workspace, dict[str, Outcome]],
) -> None:
    last = check_criteria(*tried)
    assert last["asked.constrained.citation_coverage"] == last["asked.constrained.refusal_precision"] == 1.0


def test_the_command_given_again_goes_on_with_the_fallback_until_that_is_done_too(
    tried: tuple[Workspace, dict[str, Outcome]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tried[0].folder, tmp_path / "again")
    monkeypatch.chdir(tmp_path / "again")
    first, second = (load_recipe(Path(name)) for name in ("qlora.yaml", "lora.yaml"))
    assert fallback_due(first) == Path("lora.yaml")
    assert fallback_due(second) is None
    Path("first/COMPLETE").unlink()
    assert fallback_due(first) is None, "it goes on itself"
    again = tried[1]["again"]
    assert again.code == 64
    assert again.said == [
        "run.dir: second holds a finished run; choose another run.dir or remove that folder"
    ]
    assert "evaluation.fallback is taken: lora.yaml" in again.stdout


def test_a_fallback_that_could_not_follow_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"method": "lora", "steps": 1, "rate": 1e-3}
    for name, folder, fallback in (("a", "a", "b.yaml"), ("b", "b", "c.yaml"), ("c", "a", "a.yaml")):
        Path(f"{name}.yaml").write_text(recipe(MODEL, folder, **settings, fallback=fallback))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"evaluation\.fallback: c\.yaml: its run\.dir a is that of the run"):
        refuse_fallback(load_recipe(Path("a.yaml")))
    Path("b.yaml").unlink()
    with pytest.raises(UserError, match=r"^b\.yaml"):
        refuse_fallback(load_recipe(Path("a.yaml")))
    gateless = Path("a.yaml").read_text().replace(CRITERIA, "null")
    Path("a.yaml").write_text(gateless)
    with pytest.raises(UserError, match="fallback has no meaning without a gate to miss"):
        load_recipe(Path("a.yaml"))


@pytest.mark.slow
def test_two_ranks_take_the_fallback_together_and_so_does_the_launcher(
    tried: tuple[Workspace, dict[str, Outcome]], tmp_path: Path
) -> None:
    for name in ("train.jsonl", "asked.jsonl", "answer.json", "qlora.yaml", "lora.yaml"):
        shutil.copy(tried[0].folder / name, tmp_path / name)
    place = Workspace(tmp_path)
    short = ("run.steps=1", "run.eval_every=1")
    ungated = recipe(MODEL, "second", method="lora", steps=2, rate=1e-6).replace(CRITERIA, "null")
    place.write("lora.yaml", ungated)  # its gate would be reached at step 0
    outcome = succeeded(place.train("qlora.yaml", *short, ranks=2))
    assert "evaluation.fallback is taken: lora.yaml" in outcome.stdout
    assert (tmp_path / "second/COMPLETE").exists()
    steps = {
        name: [r["step"] for r in metrics(tmp_path / name) if "loss" in r] for name in ("first", "second")
    }
    assert steps == {"first": [1], "second": [1, 2]}, "the words are for the first recipe alone"
    for name in ("first", "second"):
        shutil.rmtree(tmp_path / name)
    place.write("hosts.txt", "localhost slots=2\n")
    launched = place._run(
        [sys.executable, "-m", "mlx_empire.launch", "qlora.yaml", "--hosts", "hosts.txt"], 0o022
    )
    assert launched.code == 0, launched.stderr[-3000:]
    assert "its gate was not reached, so evaluation.fallback is taken: lora.yaml" in launched.stderr
    assert json.loads((tmp_path / "second/launch.json").read_text())["code"] == 0
    assert (tmp_path / "second/COMPLETE").exists()


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="no models/smollm2-135m; run make model")
def test_smollm2_meets_the_criteria_too(tmp_path: Path) -> None:
    """The figures of docs/graders.md."""
    last = check_criteria(*criteria_met(tmp_path, SMOLLM2, 10, 2e-3, rows()[1:]))
    for metric in ("valid_json", "json_schema", "citation_coverage", "refusal_precision"):
        assert last[f"asked.{metric}"] == 1.0
