"""Texts against regular expressions, JSON and JSON schemas."""

import pytest

from mlx_empire.errors import UserError
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
