"""docs/keys.md is what the schema says, and the schema says something of every key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlx_empire.recipe.explain import leaf_fields
from mlx_empire.recipe.load import parse_recipe
from mlx_empire.recipe.reference import KeyRow, key_rows, page

ROWS = list(key_rows())
PAGE = Path(__file__).parents[2] / "docs" / "keys.md"


def test_the_page_is_what_the_schema_says() -> None:
    assert PAGE.read_text() == page(), "run make docs"


def test_the_page_has_every_key_once() -> None:
    listed = re.findall(r"^\| `([a-z_.]+)` \|", PAGE.read_text(), re.M)
    assert listed == list(leaf_fields())
    assert len(listed) > 60


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_every_key_has_a_sentence_and_says_what_it_accepts(row: KeyRow) -> None:
    assert re.fullmatch(
        r"[A-Z][^.]{15,120}\.", row.decides.replace("metrics.jsonl", "").replace("evaluation.sets", "")
    )
    assert not row.accepts[:1].isupper()
    assert not row.accepts.endswith(".")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_the_default_is_written_as_a_recipe_would_have_it(row: KeyRow, minimal: str) -> None:
    if row.default != "must be given":
        given = (
            ["data.path=null", "data.sources=[{path: d}]"] if row.key == "data.path" else []
        )  # one of the two
        plain = parse_recipe(minimal, "x", given)
        assert plain == parse_recipe(minimal, "x", [*given, f"{row.key}={row.default}"])
