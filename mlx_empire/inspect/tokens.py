"""Decides how tokens look to a person: the text of each, and where what is read, learnt and cut off begins and ends."""

from __future__ import annotations

from typing import Literal

from mlx_empire.data.token_texts import token_texts
from mlx_empire.inspect.walk import Reading, SeenRow
from mlx_empire.recipe.text import one_line

State = Literal["read", "learnt", "cut"]
MOST_TOKENS = 1500  # of a row are shown


def states_of(row: SeenRow) -> list[State]:
    """What becomes of each token of a row."""
    learnt = row.learnt.tolist()
    return ["cut" if i >= row.kept else "learnt" if one else "read" for i, one in enumerate(learnt)]


def shown_tokens(row: SeenRow, reading: Reading) -> list[tuple[str, State]]:
    """The text and the state of each of a row's first tokens; ids where no tokenizer says what they are."""
    ids = row.tokens[:MOST_TOKENS].tolist()
    tokenizer = reading.tokenizer
    texts = [f"{one} " for one in ids] if tokenizer is None else token_texts(ids, tokenizer.decode)
    return list(zip(texts, states_of(row), strict=False))


def visible(text: str) -> str:
    """A token's text with a sign for each line break and tab, and nothing that a terminal or a page would obey."""
    if not text:
        return "·"
    lines = text.replace("\r\n", "\n").replace("\t", "⇥").split("\n")
    return "⏎\n".join(map(one_line, lines))
