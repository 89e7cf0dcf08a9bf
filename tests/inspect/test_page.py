"""The page of `inspect` in a real browser: each learnt token is green, hostile rows are text, all can be read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import browser
from support.browser import ENOUGH, needs_browser
from support.outline import Outline
from support.rows import FIXTURES, MODEL, chat
from support.saying import said

from mlx_empire.data.splits import load_splits

HOSTILE = "</code></div><script>document.title='lost'</script><img src=x onerror=alert(1)>{{ 7 * 6 }}\u202e"
LEARNT, CUT = (f".tokens[data-part=train] .{state}" for state in ("learnt", "cut"))


@pytest.fixture
def made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """(page, document, learnt tokens of an epoch by the training path) of ordinary rows and hostile ones."""
    monkeypatch.chdir(tmp_path)
    rows = [
        *map(json.loads, (FIXTURES / "wordnet" / "train.jsonl").read_text().splitlines()[:20]),
        chat(HOSTILE, HOSTILE),
        chat(HOSTILE, "otherwise"),
        chat("long", "very " * 300),
        {**chat("a", "b"), HOSTILE: 1},
        {"messages": [{"role": HOSTILE, "content": HOSTILE}]},
    ]
    name = "<img src=x onerror=alert(2)>.jsonl"
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "inspect",
        name,
        "--model",
        MODEL,
        "data.sequence_length=160",
        "--rows",
        99,
        "--html",
        "page.html",
    ]
    document = json.loads(said(capsys, *words, "--json", code=64))
    taken = Path("taken.jsonl")
    taken.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    splits = load_splits(path=taken, sequence_length=160, tokenizer_folder=MODEL)
    return Path("page.html").read_text(), document, splits.train.tokens_per_epoch


def test_it_is_one_well_formed_file_that_fetches_and_runs_nothing(made: Any) -> None:
    page, document, learnt = made
    outline = Outline(page)
    assert outline.open == []
    assert outline.suspicious == []
    assert not outline.tags & {"script", "img", "link", "iframe", "object", "form", "a", "base", "svg"}
    assert not re.search(r"url\(|@import", page)
    assert page.count('class="learnt"') - 1 == learnt == document["parts"][0]["learnt"], "the key has one too"
    text = "".join(outline.pieces)
    assert text.count("document.title='lost'") >= 3
    assert "{{ 7 * 6 }}" in text
    assert "\u202e" not in page
    for finding in document["findings"]:
        assert finding["sentence"] in text
        for place in finding["places"]:
            assert place["where"] in text
    assert "a run would refuse this data" in text


@needs_browser
@pytest.mark.parametrize(
    ("width", "dark"),
    [
        (390, True),
        *(
            pytest.param(width, dark, marks=pytest.mark.slow)
            for width, dark in ((1280, False), (1280, True), (390, False))
        ),
    ],
)
def test_a_reader_sees_every_learnt_token_and_can_read_all(
    made: Any, width: int, dark: bool, tmp_path: Path
) -> None:
    page, document, learnt = made
    seen = browser.measure(page, tmp_path, dark=dark, width=width, selectors=[LEARNT, CUT, "script", "img"])
    cut = sum(row["cut"] for row in document["shown"])
    assert cut > 0
    assert seen["counts"] == {LEARNT: learnt, CUT: cut, "script": 1, "img": 0}, "the script measures"
    assert (seen["ground"] < 0.05) == dark
    assert (seen["ground"] > 0.85) == (not dark)
    assert seen["overflow"] <= 0
    assert seen["console"] == seen["requests"] == []
    assert len(seen["texts"]) > 1000
    assert [one for one in seen["texts"] if one["contrast"] < ENOUGH] == []
