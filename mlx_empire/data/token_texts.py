"""Decides what text each of a row's tokens stands for, where people are shown tokens one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
LONGEST_CHARACTER = 8  # tokens that one character is written with, at most
BROKEN = "\N{REPLACEMENT CHARACTER}"


def token_texts(ids: Sequence[int], decode: Decode) -> list[str]:
    """The text of each token; of several that write one character the last has it, and the others are empty.

    A token is decoded behind the one before it: alone, many tokenizers take the blank off that it begins with. Each
    call of `decode` gets a few tokens, so that the time grows with the row, not with its square.
    """
    texts, before, waiting = [""] * len(ids), list[int](), list[int]()
    for place, one in enumerate(ids):
        waiting.append(one)
        head, whole = (decode(part) if part else "" for part in (before, before + waiting))
        text = whole[len(head) :] if whole.startswith(head) else decode(waiting)
        if text.endswith(BROKEN) and len(waiting) < LONGEST_CHARACTER and place + 1 < len(ids):
            continue
        texts[place] = text
        before, waiting = [one], []
    return texts
