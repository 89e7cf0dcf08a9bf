"""Scalars against the table of YAML 1.2.2, 10.3.2; structure and lines against hand-counted text."""

import math

import pytest

from mlx_empire.errors import UserError
from mlx_empire.recipe.text import parse_yaml

SCALARS = {
    "1e-5": 1e-5,
    "1.0e-5": 1e-5,
    "1E+3": 1000.0,
    ".5": 0.5,
    "5.": 5.0,
    "-0.0": 0.0,
    "+12": 12,
    "007": 7,
    "0o14": 12,
    "0x1F": 31,
    "true": True,
    "False": False,
    "null": None,
    "~": None,
    "": None,
    "-.inf": -math.inf,
    "on": "on",
    "off": "off",
    "yes": "yes",
    "No": "No",
    "1_000": "1_000",
    "1:30": "1:30",
    "2026-11-21": "2026-11-21",
    "0b101": "0b101",
    "3%": "3%",
    "5Mtok": "5Mtok",
    "e5": "e5",
    ".": ".",
    "'1e-5'": "1e-5",
    '"true"': "true",
    "=": "=",
}


@pytest.mark.parametrize(("written", "value"), SCALARS.items())
def test_scalars_follow_yaml_1_2(written: str, value: object) -> None:
    parsed = parse_yaml(f"key: {written}", "x")[0]
    assert parsed == {"key": value}
    assert type(parsed["key"]) is type(value)


def test_nan_is_a_float() -> None:
    assert math.isnan(parse_yaml("[.nan]", "x")[0][0])


def test_every_key_keeps_its_line() -> None:
    text = "# a comment\na:\n  b: 1\n\n  c:\n    - x\n    - y\nd: {e: 1,\n    f: 2}\n"
    value, lines = parse_yaml(text, "x")
    assert value == {"a": {"b": 1, "c": ["x", "y"]}, "d": {"e": 1, "f": 2}}
    expected = {("a",): 2, ("a", "b"): 3, ("a", "c"): 5, ("a", "c", "1"): 7, ("d", "e"): 8, ("d", "f"): 9}
    assert expected.items() <= lines.items()


REFUSED = {
    "repeated key": ("a: 1\nb: 2\na: 3\n", "x:3: a: this key stands on line 1 already"),
    "repeated inner key": ("a: {b: 1, b: 2}\n", "x:1: a.b: this key stands on line 1 already"),
    "anchor": ("a: &x 1\n", "x:1: YAML anchor &x"),
    "alias": ("a: 1\nb: *x\n", "x:2: YAML alias *x"),
    "tag": ("a: !!python/object/apply:os.system [ls]\n", "x:1: YAML tag"),
    "key with anchor": ("&x a: 1\n", "x:1: a key must be a plain word"),
    "list as key": ("? [a]\n: 1\n", "x:1: a key must be a plain word"),
    "two documents": ("a: 1\n---\nb: 2\n", "x:2: a second YAML document"),
    "deep": ("a: [[[[[[[[1]]]]]]]]\n", "x:1: nested deeper than"),
    "tab": ("a:\n\tb: 1\n", "x:2: not valid YAML: found character '\\t'"),
    "open bracket": ("a: [1\n", "x:2: not valid YAML"),
    "NUL": ("a: 1\nb: \0\n", "x:2: not valid YAML: it contains the character U+0000"),
    "long number": ("a: " + "9" * 5000, "x:1: a number of 5000 characters"),
    "escape beyond Unicode": ('a: "\\UFFFFFFFF"', "x: not valid YAML"),
    "directive": ("%YAML 1." + "9" * 5000 + "\n---\na: 1", "x: not valid YAML"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_what_recipes_have_no_use_for_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "x")
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1
