"""A person's own measure of answers: what it is called with, what it may not do, and that its bytes are noted."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from support.rows import MODEL
from support.speaking import answers

from mlx_empire.cli import main as cli
from mlx_empire.errors import UserError
from mlx_empire.evaluation.scorer import load_scorer, scorer_digests
from mlx_empire.recipe.load import parse_recipe

SCORER = """\
import json

def share(prompt, answer, row):
    with open("asked.jsonl", "a") as file:
        file.write(json.dumps([prompt, answer, row["want"]]) + "\\n")
    return sum(word in answer for word in row["want"]) / len(row["want"])
"""
QUESTIONS = ["Tom said", "Once upon a time"]


def test_it_gets_question_answer_and_row_and_the_mean_is_the_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(SCORER)
    said = [text.lstrip() for text in answers(QUESTIONS, None, 8, chat=True)]
    rows = [{"prompt": QUESTIONS[0]}, {"messages": [{"role": "user", "content": QUESTIONS[1]}]}]
    rows = [{**row, "want": [text[:3], "zzz", "zz"]} for row, text in zip(rows, said, strict=True)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = "{path: rows.jsonl, name: mine, metrics: [scorer], scorer: mine.py:share, max_tokens: 8}"
    words = [str(MODEL), "--json", "found.json", f"evaluation.sets=[{asked}]", "data.sequence_length=64"]
    assert cli(["evaluate", *words, "model.dtype=float32"]) == 0
    told = [json.loads(line) for line in Path("asked.jsonl").read_text().splitlines()]
    told = [[question, text.lstrip(), want] for question, text, want in told]  # a tokenizer's first blank
    assert told == [[q, a, row["want"]] for q, a, row in zip(QUESTIONS, said, rows, strict=True)]
    found = json.loads(Path("found.json").read_text())
    assert found["scores"][0]["after"] == pytest.approx(1 / 3)
    assert [row["values"] for row in found["rows"]["mine"]] == [{"scorer": 1 / 3}] * 2


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        (None, "f", r"mine\.py: No such file or directory"),
        ("def f(:", "f", r"mine\.py: SyntaxError: "),
        ("f = 3", "f", r"mine\.py: has no function f"),
        ("def g(*_): return 1", "f", r"mine\.py: has no function f"),
    ],
)
def test_what_is_no_scorer_is_refused(text: str | None, name: str, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        load_scorer(f"{tmp_path}/mine.py:{name}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return 1 / 0", "ZeroDivisionError: division by zero, for 'yes'"),
        ("return float('nan')", "gave nan for 'yes'"),
        ("return None", "TypeError: "),
    ],
)
def test_what_a_scorer_does_wrong_is_one_line_with_the_answer(body: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"def f(prompt, answer, row): {body}\n")
    scorer = load_scorer(f"{tmp_path}/mine.py:f")
    with pytest.raises(UserError, match=said):
        scorer("", "yes", {})


def test_the_bytes_of_its_file_are_noted(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(SCORER)
    text = f"""
model: {{path: m}}
data: {{path: d, sequence_length: 8}}
batch: {{global_size: 1}}
optimizer: {{learning_rate: 1}}
run: {{dir: r, steps: 1, eval_every: 1}}
evaluation: {{sets: [{{path: q.jsonl, metrics: [scorer], scorer: "{file}:share"}}]}}
"""
    digest = hashlib.sha256(SCORER.encode()).hexdigest()
    assert scorer_digests(parse_recipe(text, "r")) == {str(file): f"sha256:{digest}"}
    with pytest.raises(
        UserError, match=r"evaluation.sets: .*scorer \(file.py:function\) where a set needs them"
    ):
        parse_recipe(text.replace("[scorer]", "[valid_json]"), "r")
