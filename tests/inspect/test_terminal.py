"""`mlx-empire inspect` on a terminal: what is learnt is green or between signs; no row gives it orders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.rows import FIXTURES, MODEL, chat

from mlx_empire.inspect.tokens import visible

HOSTILE = "\x1b[2J\x1b]0;lost\x07[bold]not bold[/bold] \u202egnp\r"
WORDS = ("rows.jsonl", "--model", MODEL, "data.sequence_length=96", "--rows", 50)


@pytest.fixture
def rows() -> None:
    lines = (FIXTURES / "wordnet" / "train.jsonl").read_text().splitlines()[:6]
    more = [chat(HOSTILE, HOSTILE), chat("long", "very " * 200), chat("long " * 200, "lost")]
    Path("rows.jsonl").write_text("".join(line + "\n" for line in [*lines, *map(json.dumps, more)]))


def learnt(document: Any) -> str:
    """The text of all learnt tokens as it is shown, without line breaks."""
    return "".join(
        visible(text) for row in document["shown"] for text, state in row["tokens"] if state == "learnt"
    ).replace("\n", "")


def test_learnt_tokens_are_green_and_what_is_cut_is_struck_out(
    say: Callable[..., str], found: Callable[..., Any], rows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = found(*WORDS)
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "4000"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = say("inspect", *WORDS).partition("grey: read")[0]
    pieces = re.findall(r"\x1b\[([\d;]*)m([^\x1b]*)", text)
    green = "".join(said for codes, said in pieces if "42" in codes.split(";"))
    assert green.replace("\n", "") == learnt(document)
    struck = "".join(said for codes, said in pieces if "9" in codes.split(";"))
    cut = "".join(visible(t) for row in document["shown"] for t, state in row["tokens"] if state == "cut")
    assert struck.replace("\n", "") == cut.replace("\n", "")
    assert cut


def test_without_colours_signs_stand_around_what_is_learnt(
    say: Callable[..., str], found: Callable[..., Any], rows: None
) -> None:
    document, text = found(*WORDS), say("inspect", *WORDS)
    shown = text.partition("⟦learnt⟧")[0].replace("\n", "")
    assert "".join(re.findall("⟦(.*?)⟧", shown)) == learnt(document)
    assert "9 of 9 training rows, a fair sample" in text
    last = document["shown"][-1]
    assert last["cut"] == last["count"] - 97 > 0, "a row has a token more than positions"
    assert f"rows.jsonl:9  {last['count']:,} tokens, 0 learnt, {last['cut']:,} cut off: dropped" in text


def test_nothing_that_a_terminal_obeys_comes_from_a_row(say: Callable[..., str], rows: None) -> None:
    text = say("inspect", *WORDS)
    assert not set("\x1b\x07\r\u202e") & set(text)
    assert "\\x1b[2J\\x1b]0;lost\\x07[bold]not bold[/bold]" in text
