"""Answers that a grammar holds: the likeliest token of those that may follow, always JSON within the schema."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from support.mpi import mpirun, rank_environment
from support.rows import MODEL

from mlx_empire import progress
from mlx_empire.cli import main as cli
from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.errors import UserError
from mlx_empire.evaluate.command import read
from mlx_empire.evaluate.named import recipes_of
from mlx_empire.evaluation.constrained import Grammar, generate_constrained
from mlx_empire.evaluation.evaluator import read_sets
from mlx_empire.evaluation.generation import generate, generate_each

SCHEMA = {
    "type": "object",
    "properties": {
        "answer": {"type": "string", "maxLength": 12},
        "citations": {"type": "array", "items": {"enum": ["1", "2"]}, "maxItems": 2},
    },
    "required": ["answer", "citations"],
    "additionalProperties": False,
}
PROMPTS = ["Tom said", "Once upon a time"]
SETTINGS = ["data.sequence_length=128", "model.dtype=float32"]


def write(folder: Path, schema: Any) -> str:
    (folder / "q.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in PROMPTS))
    (folder / "schema.json").write_text(json.dumps(schema))
    return (
        f"evaluation.sets=[{{path: {folder}/q.jsonl, schema: {folder}/schema.json, constrained: true, "
        "max_tokens: 60, metrics: [valid_json, json_schema]}]"
    )


def evaluated(folder: Path, schema: Any, *words: str) -> dict[str, Any]:
    asked = [str(MODEL), write(folder, schema), "--json", str(folder / "found.json"), *SETTINGS, *words]
    assert cli(["evaluate", *asked]) == 0
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def test_the_second_column_is_whole_where_the_free_one_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(tmp_path, SCHEMA, "--html", str(tmp_path / "page.html"))
    scores = {one["name"]: one["after"] for one in found["scores"]}
    assert {name: value for name, value in scores.items() if "constrained" in name} == {
        "q.constrained.valid_json": 1.0,
        "q.constrained.json_schema": 1.0,
    }
    assert scores["q.json_schema"] == scores["q.valid_json"] == 0.0
    for row in found["rows"]["q.constrained"]:
        jsonschema.validate(json.loads(row["said"]), SCHEMA)
    line = next(line for line in capsys.readouterr().out.splitlines() if "q.json_schema" in line)
    assert line.index("0.0000") < line.index("1.0000")
    page = (tmp_path / "page.html").read_text()
    assert "q: what is wrong" in page
    assert "q.constrained: what is wrong" not in page
    assert "now, constrained" in page


def test_each_token_is_the_likeliest_of_those_that_may_follow(tmp_path: Path) -> None:
    """Beside the whole model by mlx-lm, with texts few enough to try each."""
    allowed = ["the moon", "a red ball", "a blue hat", "then"]
    found = evaluated(tmp_path, {"enum": allowed})
    model, tokenizer = mlx_lm.load(str(MODEL))[:2]
    model.set_dtype(mx.float32)
    words = [tokenizer.decode([token]) for token in range(model.args.vocab_size)]
    (end,) = tokenizer.eos_token_ids
    texts = [json.dumps(text) for text in allowed]
    for prompt, row in zip(PROMPTS, found["rows"]["q.constrained"], strict=True):
        question = [{"role": "user", "content": prompt}]
        ids = list(tokenizer.apply_chat_template(question, add_generation_prompt=True))
        said = ""
        while said not in texts:
            logits = np.array(model(mx.array([ids]))[0, -1])
            may = [
                token
                for token, word in enumerate(words)
                if word and token != end and any(text.startswith(said + word) for text in texts)
            ]
            token = may[int(np.argmax(logits[may]))]
            ids, said = [*ids, token], said + words[token]
        assert row["said"] == said


def test_a_schema_that_no_grammar_can_hold_is_one_line_before_anything_is_generated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        evaluated(tmp_path, {"type": "array", "uniqueItems": True})
    assert ended.value.code == 64
    said = capsys.readouterr().err
    assert "evaluation.sets: q.constrained: row 1: schema: cannot be held by a grammar: " in said
    assert said.count("\n") == 1


def test_what_the_grammar_library_says_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("no\x1b bytes\nof tokens")

    monkeypatch.setattr("llguidance.hf.from_tokenizer", refuse)
    with pytest.raises(UserError, match=r"none that a grammar can read \(no\\x1b bytes\)$"):
        Grammar(None, 8, [0])
    monkeypatch.setattr("llguidance.hf.from_tokenizer", lambda *_: None)
    said = SimpleNamespace(
        grammar_from_json_schema=lambda *_, **__: "",
        validate_grammar_with_warnings=lambda *_: (True, ["\nkey \x1b\nmore"]),
    )
    monkeypatch.setattr("llguidance.LLMatcher", said)
    with pytest.raises(UserError, match=r"^q: row 1: schema: cannot be held by a grammar: key \\x1b$"):
        Grammar(None, 8, [0]).refuse({}, "q: row 1")


def test_each_different_schema_is_tried_once_and_named_where_it_stands_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = write(tmp_path, SCHEMA)
    own: list[dict[str, Any]] = [{}, {"schema": {"enum": ["a"]}}, {}, {"schema": {"enum": ["a"]}}]
    lines = [json.dumps({"prompt": "Tom said", **more}) + "\n" for more in own]
    (tmp_path / "q.jsonl").write_text("".join(lines))
    tried: list[tuple[Any, str]] = []
    monkeypatch.setattr(Grammar, "refuse", lambda grammar, *told: tried.append(told))
    (recipe,) = recipes_of(read([str(MODEL), asked, *SETTINGS]), 1)
    vocabulary = json.loads((MODEL / "config.json").read_text())["vocab_size"]
    read_sets(recipe, vocabulary)
    where = "evaluation.sets: q.constrained: row"
    assert tried == [(SCHEMA, f"{where} 1"), ({"enum": ["a"]}, f"{where} 2")]


@pytest.mark.parametrize("way", ["batches", "one by one", "constrained"])
def test_whoever_writes_answers_shows_the_watchdog_that_it_goes_on(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No message moves meanwhile, and hours of writing are no hang."""
    model, tokenizer = mlx_lm.load(str(MODEL))[:2]
    trainer: Any = SimpleNamespace(whole_model=lambda: nullcontext(model))
    comm, prompts, ends = SoloCommunicator("here"), [[1, 2, 3]] * 9, list(tokenizer.eos_token_ids)
    signs: list[int] = []
    monkeypatch.setattr(progress, "moved", lambda: signs.append(1))
    if way == "constrained":
        grammar = Grammar(tokenizer, model.args.vocab_size, ends)
        asked = [(prompt, SCHEMA) for prompt in prompts]
        found = generate_constrained(trainer, comm, grammar, asked, [2] * 9, ends)
    else:
        write_all = generate if way == "batches" else generate_each
        found = write_all(trainer, comm, prompts, [2] * 9, ends)
    assert len(found) == 9
    assert len(signs) >= (2 if way == "batches" else 9)


@pytest.mark.slow
def test_two_ranks_write_what_one_writes(tmp_path: Path) -> None:
    alone = evaluated(tmp_path, SCHEMA)
    command = [mpirun(), "--oversubscribe", "-n", "2", sys.executable, "-m", "mlx_empire.evaluate"]
    command += [str(MODEL), write(tmp_path, SCHEMA), "--json", "two.json", *SETTINGS]
    subprocess.run(command, cwd=tmp_path, env=rank_environment(str(tmp_path)), check=True)
    both = json.loads((tmp_path / "two.json").read_text())
    assert both["scores"] == alone["scores"]
    assert both["rows"] == alone["rows"]
