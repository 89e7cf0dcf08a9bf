"""Texts against regular expressions, JSON and JSON schemas."""

import numpy as np
import pytest

from mlx_empire.errors import UserError
from mlx_empire.evaluation.evaluator import _of_answers
from mlx_empire.evaluation.questions import fits_schema, is_json, matches, schema_checker

SCHEMA = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string"}, "age": {"minimum": 0}},
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": [1, null]}', True),
        (" 3\n", True),
        ("{", False),
        ("", False),
        ("NaN", False),
        ('{"a": 1} x', False),
    ],
)
def test_json_is_the_whole_text(text, expected):
    assert is_json(text) == expected


def test_a_pattern_is_found_anywhere_unless_it_is_anchored():
    assert matches("it is 42 m", r"\d+ m")
    assert not matches("it is 42 m", r"^\d+ m$")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "x"}', True),
        ('{"name": 3}', False),
        ('{"age": 3}', False),
        ("name", False),
        ('{"name": "x", "age": -1}', False),
    ],
)
def test_schemas(text, expected):
    assert fits_schema(text, SCHEMA) == expected


def test_what_is_no_schema_is_refused():
    with pytest.raises(UserError, match="here: not a JSON schema"):
        schema_checker({"type": "objekt"}, "here")


def test_an_answer_with_one_wrong_token_is_not_exact():
    """Sums by answer: log-probability, likeliest tokens, counted tokens."""
    found = _of_answers(np.array([[-1.0, 2, 2], [-3.0, 1, 2], [-0.5, 0, 1], [-0.5, 5, 5]]))
    assert found["exact_match"] == 2 / 4
    assert found["token_accuracy"] == 8 / 10
    assert found["loss"] == 0.5
    assert found["perplexity"] == pytest.approx(1.6487212707)
