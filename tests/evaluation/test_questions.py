"""Evaluation sets: what becomes of their rows, and the rows that are refused by file and line."""

import json
from pathlib import Path

import pytest

from mlx_empire.errors import UserError
from mlx_empire.evaluation.evaluator import from_json, to_json
from mlx_empire.evaluation.questions import load_questions
from mlx_empire.recipe.evaluation import EvaluationSet

MODEL = Path(__file__).parents[1] / "fixtures/tiny-llama-260k"


def questions(tmp_path, rows, metrics, length=64, **fields):
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = EvaluationSet.model_validate({"path": str(path), "metrics": metrics, **fields})
    return load_questions(asked, MODEL, length, 512)


def test_answers_count_and_prompts_do_not(tmp_path):
    found = questions(tmp_path, [{"prompt": "one two", "completion": " three"}], ["exact_match", "loss"])
    (answer,) = found.answers
    assert 0 < sum(answer.counted) < len(answer.tokens)
    assert found.title == "set"
    assert from_json(json.loads(json.dumps(to_json([found])))) == [found]


def test_choices_share_their_prompt(tmp_path):
    rows = [{"prompt": "the sky is", "choices": [" blue", " a sandwich"], "answer": 0}]
    ((alternatives, right),) = questions(tmp_path, rows, ["multiple_choice"]).choices
    assert right == 0
    shared = sum(1 for flag in alternatives[0].counted if not flag)
    assert alternatives[0].tokens[:shared] == alternatives[1].tokens[:shared]


def test_prompts_bring_their_own_pattern_or_the_sets(tmp_path):
    rows = [{"prompt": "say 1", "pattern": "1"}, {"messages": [{"role": "user", "content": "say 2"}]}]
    found = questions(tmp_path, rows, ["regular_expression"], pattern="[0-9]", max_tokens=8)
    assert [p.pattern for p in found.prompts] == ["1", "[0-9]"]
    assert found.max_tokens == 8


@pytest.mark.parametrize(
    ("rows", "metrics", "fields", "message"),
    [
        ([], ["loss"], {}, "no rows; put at least one there"),
        ([{"tokens": list(range(99))}], ["loss"], {}, ":1: 99 tokens are more than data.sequence_length 64"),
        ([{"tokens": [5]}], ["loss"], {}, ":1: no token of an answer"),
        ([{"tokens": [5, 600]}], ["loss"], {}, ":1: token id 600 is outside"),
        ([{"question": "?"}], ["loss"], {}, ":1: no known keys"),
        ([{"prompt": "a", "choices": ["b"], "answer": 0}], ["multiple_choice"], {}, "two texts or more"),
        ([{"prompt": "a", "choices": ["b", "c"], "answer": 2}], ["multiple_choice"], {}, "answer is 2"),
        ([{"prompt": "a"}], ["regular_expression"], {}, ":1: regular_expression needs a pattern"),
        ([{"prompt": "a", "pattern": "("}], ["regular_expression"], {}, "is no regular expression"),
        ([{"prompt": "a"}], ["json_schema"], {}, ":1: json_schema needs a schema"),
        ([{"prompt": "a"}], ["json_schema"], {"schema": "nowhere.json"}, "schema nowhere.json: No such file"),
        ([{"text": "a"}], ["valid_json"], {}, ":1: a row that is to be continued needs prompt or messages"),
        ([{"prompt": "a " * 60}], ["valid_json"], {"max_tokens": 32}, "and max_tokens 32 are more than"),
    ],
)
def test_rows_that_cannot_be_used_are_named(rows, metrics, fields, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        questions(tmp_path, rows, metrics, **fields)
    assert "\n" not in str(error.value)
