"""Decides which token ends an assistant's turn, and where in a rendered text it stands.

Most templates close a turn (`<|im_end|>`, `<|eot_id|>`, `</s>`). Some close nothing (GLM 4.5): there the next role's
marker is what ends an answer in generation, so it is taught like a closing. Generation stops at the same tokens: both
read `eos_token_ids` of one tokenizer (`encode.load_tokenizer`).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Stops:
    """The texts of the end-of-sequence tokens, and of all special tokens."""

    ends: tuple[str, ...]
    specials: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> "Stops":
        """Those of mlx-lm's tokenizer."""
        ends = (tokenizer.decode([number]) for number in sorted(tokenizer.eos_token_ids))
        specials = (str(token) for token in tokenizer.added_tokens_decoder.values())
        # A token outside the vocabulary has no text, and every text ends with "".
        return cls(tuple(filter(str.strip, ends)), tuple(filter(str.strip, specials)))

    def closed(self, turn: str) -> int | None:
        """How long `turn` is up to the last end in its closing (the white space and special tokens that it ends with)
        and the white space after that; None where the closing holds no end. What follows is the next role's."""
        rest = turn.rstrip()
        while not rest.endswith(self.ends):
            last = max((s for s in self.specials if rest.endswith(s)), key=len, default="")
            if not last:
                return None
            rest = rest[: -len(last)].rstrip()
        return len(rest) + _white(turn[len(rest) :])

    def ended(self, after: str) -> int | None:
        """How much of `after`, which follows what a turn says, is up to its last end and the white space after that."""
        last = max((after.rfind(end) + len(end) for end in self.ends if end in after), default=None)
        return None if last is None else last + _white(after[last:])

    def opening(self, following: str) -> str:
        """The end that `following` begins with, with the white space before it; "" where there is none."""
        rest = following.lstrip()
        end = max((e for e in self.ends if rest.startswith(e)), key=len, default="")
        return following[: len(following) - len(rest)] + end if end else ""

    def whole(self, text: str, end: int) -> int:
        """`end`, moved to the beginning of the special token of `text` that it cuts in two, if it does."""
        names, first_letters, longest = self._index
        for start in range(max(0, end - longest + 1), end):
            if text[start] in first_letters and any(
                text[start : start + length] in names
                for length in range(end - start + 1, min(longest, len(text) - start) + 1)
            ):
                return start
        return end

    @cached_property
    def _index(self) -> tuple[frozenset[str], frozenset[str], int]:
        """The special tokens, their first letters and the length of the longest: some tokenizers have thousands."""
        letters = frozenset(token[0] for token in self.specials)
        return frozenset(self.specials), letters, max(map(len, self.specials), default=0)


def _white(text: str) -> int:
    """How many characters of white space `text` begins with."""
    return len(text) - len(text.lstrip())
