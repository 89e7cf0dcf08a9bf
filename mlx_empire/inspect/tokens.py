"""Decides how tokens look to a person: the text of each, and where what is read, learnt and cut off begins and ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from mlx_empire.inspect.walk import Reading, SeenRow
from mlx_empire.recipe.text import one_line

State = Literal["read", "learnt", "cut"]
MOST_TOKENS = 1500  # of a row are shown
LONGEST_CHARACTER = 8  # tokens that one character is written with, at most
BROKEN = "\ufffd"


def states_of(row: SeenRow) -> list[State]:
    """What becomes of each token of a row."""
    learnt = row.learnt.tolist()
    return ["cut" if i >= row.kept else "learnt" if one else "read" for i, one in enumerate(learnt)]


def shown_tokens(row: SeenRow, reading: Reading) -> list[tuple[str, State]]:
    """The text and the state of each of a row's first tokens; ids where no tokenizer says what they are."""
    ids = row.tokens[:MOST_TOKENS].tolist()
    texts = [f"{one} " for one in ids] if reading.tokenizer is None else token_texts(reading.tokenizer, ids)
    return list(zip(texts, states_of(row), strict=False))


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token; of several that write one character the last has it, and the others are empty.

    A token is decoded behind the one before it: alone, many tokenizers take the blank off that it begins with.
    """
    texts, before, waiting = [""] * len(ids), list[int](), list[int]()
    for place, one in enumerate(ids):
        waiting.append(one)
        head, whole = (tokenizer.decode(part) if part else "" for part in (before, before + waiting))
        text = whole[len(head) :] if whole.startswith(head) else tokenizer.decode(waiting)
        if text.endswith(BROKEN) and len(waiting) < LONGEST_CHARACTER and place + 1 < len(ids):
            continue
        texts[place] = text
        before, waiting = [one], []
    return texts


def visible(text: str) -> str:
    """A token's text with a sign for each line break and tab, and nothing that a terminal or a page would obey."""
    if not text:
        return "·"
    lines = text.replace("\r\n", "\n").replace("\t", "⇥").split("\n")
    return "⏎\n".join(map(one_line, lines))
