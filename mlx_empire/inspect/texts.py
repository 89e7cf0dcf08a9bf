"""Decides what a row says, as text, and when two rows say the same; no tokenizer is needed for it.

A row has a *prompt*, what its last answer follows, and that *answer*. Two rows are exactly the same where all that is
read of them is; they are nearly the same where their words are, in order: Unicode's compatible forms, large and small
letters, punctuation and white space aside.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from mlx_empire.data.files import RawRow
from mlx_empire.data.messages import parts_of, standard_role
from mlx_empire.data.row_format import KEYS

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class RowTexts:
    """Digests (64 bits) of a row: all of it, its words, its prompt (0: none), its answer. `answer`: as text, for what
    looks at many answers together; `characters`: of all texts."""

    exact: int
    words: int
    prompt: int
    reply: int
    answer: str
    characters: int


def texts_of(row: RawRow, data_format: str) -> RowTexts:
    """What a row of that format says, which `check_row` and, for a conversation, `read_conversation` let through."""
    value = row.value
    if data_format == "tokens":
        exact = digest64(value["tokens"])
        return RowTexts(exact, exact, 0, exact, "", 0)
    whole: list[Any] = [value[key] for key in KEYS[data_format]]
    if data_format == "chat":
        messages = value["messages"]
        last = _last_answer(messages)
        whole.append(value.get("tools") or value.get("functions"))
        before, after = [messages[:last], whole[-1]], messages[last:]
        said, answer = [_said(message) for message in messages], "\n".join(map(_said, after[:1]))
    elif data_format == "completions":
        before, after = [value["prompt"]], [value["completion"]]
        said, answer = [value["prompt"], value["completion"]], value["completion"]
    else:
        before, after, said, answer = [], [value["text"]], [value["text"]], value["text"]
    exact = digest64(whole)
    in_words = "\n".join(map(normalised, said))
    return RowTexts(
        exact,
        digest64(in_words) if in_words.strip() else exact,
        digest64(before) if before else 0,
        digest64(after),
        answer,
        sum(map(len, said)),
    )


def digest64(value: Any) -> int:
    """64 bits of anything that is JSON, never 0. Of ten million rows some two look alike once in 400,000 data sets."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) or 1


def normalised(text: str) -> str:
    """The words of a text in small letters, a blank between."""
    return " ".join(words(text))


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores, in small letters and Unicode's compatible forms."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def first_content(row: RawRow, data_format: str) -> str:
    """The first text of a row that a chat template writes."""
    return _said(row.value["messages"][0]) if data_format == "chat" else str(row.value["prompt"])


def plain(row: RawRow, data_format: str, most: int) -> str:
    """What a row says in at most so many characters, each message with its role."""
    value = row.value
    if data_format == "tokens":
        return " ".join(map(str, value["tokens"][:most]))[:most]
    if data_format == "chat":
        lines = [f"{standard_role(str(message['role']))}: {_said(message)}" for message in value["messages"]]
        return "\n".join(lines)[:most]
    return "\n".join(value[key] for key in KEYS[data_format])[:most]


def _last_answer(messages: Sequence[Mapping[str, Any]]) -> int:
    """The place of the last message of the assistant; one past the end where there is none."""
    answers = [n for n, message in enumerate(messages) if standard_role(str(message["role"])) == "assistant"]
    return answers[-1] if answers else len(messages)


def _said(message: Mapping[str, Any]) -> str:
    """What a message says: its content, and the calls that it makes."""
    calls = message.get("tool_calls") or message.get("function_call")
    called = [json.dumps(calls, ensure_ascii=False, default=str)] if calls else []
    return "\n".join([*_contents(message.get("content")), *called])


def _contents(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    for part in parts_of(content):
        text = part.get("text", part.get("thinking"))
        if isinstance(text, str):
            yield text
