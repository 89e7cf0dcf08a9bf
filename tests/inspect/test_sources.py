"""`mlx-empire inspect` of a recipe with several sources: each as it stands alone, and what leaks between them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.rows import MODEL

RECIPE = f"""\
model: {{path: {MODEL}}}
data: {{sources: [{{path: a.jsonl}}, {{path: b, weight: 2}}], sequence_length: 64, validation_split: 0.5}}
batch: {{global_size: 4}}
optimizer: {{learning_rate: 1.0e-3}}
run: {{dir: run, steps: 3}}
"""


def lines(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.fixture
def recipe(say: Callable[..., str]) -> None:
    Path("b").mkdir()
    Path("mixed.yaml").write_text(RECIPE)
    Path("a.jsonl").write_text(
        lines("the sun is warm", "rain falls on hills", "one dog barks", "two cats sleep")
    )
    Path("b/train.jsonl").write_text(lines("a boat sails home", "the tide is high"))
    Path("b/valid.jsonl").write_text(lines("a ship comes in", "the moon is far"))


def test_each_source_is_shown_as_it_is_alone(
    recipe: None, say: Callable[..., str], found: Callable[..., Any]
) -> None:
    document = found("mixed.yaml")
    assert [one["data"] for one in document["sources"]] == ["a.jsonl", "b"]
    for name, one in zip(("a.jsonl", "b"), document["sources"], strict=True):
        alone = found("mixed.yaml", "data.sources=[]", f"data.path={name}")
        for of_steps in ("steps_per_epoch", "rows_per_step"):  # a step has rows of all
            assert one.pop(of_steps) is None
        assert one == {key: alone[key] for key in one}
    text = say("inspect", "mixed.yaml")
    assert "a.jsonl: rows of format text" in text
    assert "b: rows of format text" in text
    assert text.rstrip().endswith("mlx-empire train mixed.yaml")
    assert text.count("next:") == 1


def test_a_row_that_one_source_holds_out_and_another_trains_on_leaks(
    recipe: None, say: Callable[..., str], found: Callable[..., Any]
) -> None:
    with Path("a.jsonl").open("a") as rows:
        rows.write(lines(*["the moon is far"] * 9))
    document = found("mixed.yaml", code=65)
    (leak,) = [one for one in document["sources"][1]["findings"] if one["level"] == "leak"]
    assert (leak["name"], leak["count"]) == ("leakage_exact", 1)
    assert leak["places"][0]["where"].startswith("b/valid.jsonl:2")
    assert leak["places"][0]["says"].startswith("as a.jsonl:")
    assert document["next"] is None
    assert "next:\n  take the rows that are in both out" in say("inspect", "mixed.yaml", code=65)


@pytest.mark.parametrize("option", [["--loss"], ["--html", "page.html"]])
def test_what_shows_one_place_alone_is_refused(
    recipe: None, say: Callable[..., str], option: list[str]
) -> None:
    told = say("inspect", "mixed.yaml", *option, code=64)
    assert "show one place alone" in told
    assert "data.sources=[] data.path=a.jsonl" in told
    assert told.count("\n") == 1
