"""A person's own measure of answers: what it is called with, what it may not do, and that its bytes are noted."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from support.rows import MODEL
from support.speaking import answers, finish, write_adapter

from mlx_empire.cli import main as cli
from mlx_empire.errors import UserError
from mlx_empire.evaluate.command import read
from mlx_empire.evaluate.named import recipes_of
from mlx_empire.evaluation.evaluator import AskedSets, Evaluator
from mlx_empire.evaluation.scorer import Scorer, load_scorers
from mlx_empire.recipe.evaluation import EvaluationSet
from mlx_empire.recipe.load import parse_recipe

SCORER = """\
import json

def share(prompt, answer, row):
    with open("asked.jsonl", "a") as file:
        file.write(json.dumps([prompt, answer, row["want"]]) + "\\n")
    return sum(word in answer for word in row["want"]) / len(row["want"])
"""
RECIPE = """
model: {path: m}
data: {path: d, sequence_length: 8}
batch: {global_size: 1}
optimizer: {learning_rate: 1}
run: {dir: r, steps: 1, eval_every: 1}
"""
QUESTIONS = ["Tom said", "Once upon a time"]


def scorer(named: str) -> Scorer:
    asked = EvaluationSet.model_validate({"path": "q.jsonl", "metrics": ["scorer"], "scorer": named})
    return load_scorers([asked])["q"]


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


def test_code_that_only_a_run_s_recipe_names_is_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, ran = tmp_path / "theirs", tmp_path / "ran"
    write_adapter(run / "final", seed=100)
    finish(run)
    code = tmp_path / "theirs.py"
    code.write_text(f"open({str(ran)!r}, 'w').close()\ndef share(*_): return 1\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Tom said"}\n')
    told = json.loads((run / "recipe.yaml").read_text())
    one = {
        "path": f"{tmp_path}/rows.jsonl",
        "metrics": ["scorer"],
        "scorer": f"{code}:share",
        "max_tokens": 1,
    }
    told["evaluation"] = {"sets": [one]}
    told["run"]["eval_every"] = 1
    (run / "recipe.yaml").write_text(json.dumps(told))
    with pytest.raises(SystemExit) as ended:
        cli(["evaluate", str(run)])
    assert ended.value.code == 64
    said = f"RUN: {run}: its recipe names code, {code}:share; look at it, then add --scorers to run it\n"
    assert capsys.readouterr().err.endswith(said)
    assert not ran.exists()
    chosen = [
        recipes_of(read([str(run), *words]), 1)[-1]
        for words in (["--scorers"], [f"evaluation.sets=[{json.dumps(one)}]"])
    ]
    assert [each.evaluation.sets[0].scorer for each in chosen] == [f"{code}:share"] * 2


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
        scorer(f"{tmp_path}/mine.py:{name}")
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
    found = scorer(f"{tmp_path}/mine.py:f")
    with pytest.raises(UserError, match=said):
        found("", "yes", {})


def test_its_file_is_read_once_and_the_bytes_that_were_run_are_noted(tmp_path: Path) -> None:
    """Also where two sets have functions of one file, and where it is another by the time that answers are judged."""
    file, times = tmp_path / "mine.py", tmp_path / "times"
    text = f"open({str(times)!r}, 'a').write('x')\ndef f(*_): return 1\ndef g(*_): return 2\n"
    file.write_text(text)
    asked = [f'{{path: q{n}.jsonl, metrics: [scorer], scorer: "{file}:{n}"}}' for n in "fg"]
    scorers = load_scorers(
        parse_recipe(RECIPE + f"evaluation: {{sets: [{', '.join(asked)}]}}", "r").evaluation.sets
    )
    file.write_text("raise SystemExit")
    evaluator = Evaluator(AskedSets([], scorers=scorers), 8, 1)
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert evaluator.scorer_digests == {str(file): f"sha256:{digest}"}
    assert {title: one("", "", {}) for title, one in scorers.items()} == {"qf": 1, "qg": 2}
    assert times.read_text() == "x"


def test_it_may_have_classes_with_fields(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Marks:\n    share: float\ndef f(*_): return Marks(0.5).share\n"
    )
    assert scorer(f"{tmp_path}/mine.py:f")("", "", {}) == 0.5


def test_a_scorer_goes_with_its_metric() -> None:
    with pytest.raises(
        UserError, match=r"evaluation.sets: .*scorer \(file.py:function\) where a set needs them"
    ):
        parse_recipe(RECIPE + "evaluation: {sets: [{path: q, metrics: [valid_json], scorer: 'm.py:f'}]}", "r")
