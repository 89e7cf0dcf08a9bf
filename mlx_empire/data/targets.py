"""Decides which tokens of a text are training targets, and what stands around it.

Flags are uint8 (n,), 1 where the token is a target; they are changed in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mlx_empire.data.spans import Span


def uncount_bos(tokens: np.ndarray, flags: np.ndarray, tokenizer: Any) -> None:
    """A token that begins documents is no target, but where it ends them too, as GPT-2's."""
    bos = tokenizer.bos_token_id
    if bos is not None and bos not in tokenizer.eos_token_ids:
        flags[tokens == bos] = 0


def begun(tokens: np.ndarray, flags: np.ndarray, head: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """A text's tokens and flags behind `head`, which is no target and never there twice."""
    if tokens[: len(head)].tolist() != head:
        tokens = np.concatenate([np.array(head, np.int32), tokens])
        flags = np.pad(flags, (len(head), 0))
    flags[: len(head)] = 0
    return tokens, flags


def ended(tokens: np.ndarray, flags: np.ndarray, tail: list[int], end: int) -> tuple[np.ndarray, np.ndarray]:
    """A text's tokens and flags with `tail` and the end token, neither of them twice; the end token is a target."""
    added = tail if tokens[len(tokens) - len(tail) :].tolist() != tail else []
    if [*tokens[-1:].tolist(), *added][-1:] != [end]:
        added = [*added, end]
    tokens = np.concatenate([tokens, np.array(added, np.int32)])
    flags = np.pad(flags, (0, len(added)))
    flags[-1] = 1
    return tokens, flags


def flags_by_offset(offsets: list[tuple[int, int]], spans: list[Span]) -> np.ndarray:
    """A token is a target when it holds a character of a span.

    So does a token that begins in the prompt, such as " four" where the prompt ends with the space: counting
    it teaches the answer's first word, leaving it out would drop that word.
    """
    edges = np.array(offsets, np.int64).reshape(-1, 2)
    starts, ends = edges[:, 0], edges[:, 1]
    flags = np.zeros(len(offsets), np.uint8)
    for start, end in spans:
        # A token without characters (a prefix space of SentencePiece) counts where it stands.
        flags[(starts < end) & ((ends > start) | (starts >= start))] = 1
    return flags


def flags_by_prefix(tokenizer: Any, text: str, spans: list[Span], ids: list[int]) -> np.ndarray:
    """The same without offsets (tokenizers written in Python): count the tokens that a prefix shares."""
    from mlx_empire.data.spans import shared_prefix  # see `encode_rows`

    def shared(end: int) -> int:
        prefix = tokenizer.encode(text[:end], add_special_tokens=False)
        return shared_prefix(prefix, ids)

    flags = np.zeros(len(ids), np.uint8)
    for start, end in spans:
        flags[shared(start) : shared(end)] = 1
    return flags
