"""Decides what the columns of other tools' rows mean: which is asked, which is answered, and who says a message.

A layout is told by the keys of the first row. What has no place in a conversation is not carried, and counted; a row
that training would refuse, or of which nothing would be learnt, is dropped with its reason (`Unusable`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mlx_empire.data.files import RawRow
from mlx_empire.data.messages import CALL_ROLES, SYSTEM, read_conversation, standard_role
from mlx_empire.errors import UserError

Value = Mapping[str, Any]
Row = dict[str, Any]

TOOLS = ("tools", "functions")
ALPACA_ANSWERS = ("output", "response")
ALPACA_INPUTS = ("input", "context")
# What is asked, and what may answer it.
PAIRS = (
    ("prompt", ("completion", "response", "answer", "output")),
    ("question", ("answer", "response", "output")),
    ("query", ("response", "answer", "output")),
    ("problem", ("solution", "answer")),
    ("user", ("assistant",)),
    ("input", ("output", "response")),
)
RESULT_ROLES = {"function_response": "tool", "tool_result": "tool"}


class Unusable(ValueError):
    """Why a row cannot be used."""


@dataclass(frozen=True)
class RowLayout:
    """`title`: its name; `mapping`: in words, what becomes of which key; `keys`: those that are read."""

    title: str
    mapping: str
    keys: tuple[str, ...]
    make: Callable[[Value], Row]

    def row(self, raw: RawRow) -> Row:
        """The row as ours. Unusable."""
        made = self.make(raw.value)
        if "messages" not in made:
            return made
        try:
            read = read_conversation(RawRow(raw.where, made), made["messages"])
        except UserError as error:
            raise Unusable(str(error).removeprefix(f"{raw.where}: ")) from None
        if not any(read.learnt):
            raise Unusable("no message of the assistant")
        return made


def layout_of(first: RawRow, columns: Sequence[str] | None) -> RowLayout:
    """The layout of rows like the first one; `columns`: the prompt's and the answer's, where a person names them.

    Errors: UserError where it is none that is known.
    """
    keys = first.value
    if columns is not None:
        absent = [name for name in columns if name not in keys]
        if absent:
            raise UserError(
                f"{first.where}: --columns: no column {absent[0]!r:.60}; there are {_listed(first)}"
            )
        return _pair("named columns", columns[0], columns[1])
    for name in ("messages", "conversations", "conversation"):
        if isinstance(_unpacked(keys.get(name)), list):
            return _conversation(name)
    answer = next((name for name in ALPACA_ANSWERS if name in keys), None)
    if "instruction" in keys and answer is not None:
        return _alpaca(answer)
    for prompt, answers in PAIRS:
        answer = next((name for name in answers if name in keys), None)
        if prompt in keys and answer is not None:
            return _pair("prompt and answer", prompt, answer)
    if "text" in keys:
        return RowLayout(
            "texts", "text stays text", ("text",), lambda value: {"text": text_at(value, "text")}
        )
    raise UserError(
        f"{first.where}: no layout that is known; its columns are {_listed(first)}: say which are learnt from with "
        "--columns PROMPT,ANSWER"
    )


def text_at(value: Value, key: str) -> str:
    """The text in a column. Unusable where there is none."""
    found = value.get(key)
    if not is_filled(found):
        raise Unusable(f"{key!r} is {'empty' if isinstance(found, str) else 'missing'}")
    if isinstance(found, bool | int | float):
        return str(found)
    if not isinstance(found, str):
        raise Unusable(f"{key!r} is a {type(found).__name__}")
    return found


def is_filled(value: Any) -> bool:
    """Whether something stands in a column: blanks are nothing, nor is NaN, which tables have where a cell is empty."""
    if isinstance(value, str):
        return bool(value.strip())
    return value not in (None, [], {}) and not (isinstance(value, float) and math.isnan(value))


def _listed(row: RawRow) -> str:
    return ", ".join(map(repr, list(row.value)[:12])) or "none"


def _filled(value: Value, names: Sequence[str]) -> str | None:
    """Which of these keys, that mean one thing, is filled. Unusable where two differ: one of them would be lost."""
    found = [name for name in names if is_filled(value.get(name))]
    other = next((name for name in found if value[name] != value[found[0]]), None)
    if other is not None:
        raise Unusable(f"{found[0]!r} and {other!r} mean the same, and differ here; keep one of them")
    return found[0] if found else None


def _system(value: Value) -> list[Row]:
    """The system message that stands beside what is said, if one does."""
    name = _filled(value, SYSTEM)
    return [] if name is None else [{"role": "system", "content": text_at(value, name)}]


def _conversation(name: str) -> RowLayout:
    """ShareGPT's conversations, or messages: who says what, in order; a system message beside them goes first."""

    def make(value: Value) -> Row:
        messages = _unpacked(value.get(name))
        if not isinstance(messages, list) or not messages:
            raise Unusable(f"{name!r} is not a list of one message or more")
        said = [*_system(value), *(_message(message, number) for number, message in enumerate(messages, 1))]
        tools = _filled(value, TOOLS)
        return {"messages": said, **({} if tools is None else {tools: value[tools]})}

    title = "ShareGPT" if name == "conversations" else "conversations"
    mapping = (
        f"{name} become messages (from and value: role and content), system the first of them; tools stay"
    )
    return RowLayout(title, mapping, (name, *SYSTEM, *TOOLS), make)


def _unpacked(value: Any) -> Any:
    """A list that a table could hold as JSON text only; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _message(message: Any, number: int) -> Row:
    if not isinstance(message, dict):
        raise Unusable(f"message {number} is a {type(message).__name__}")
    if "from" not in message and "value" not in message:
        return dict(message)
    role, content = message.get("from"), message.get("value")
    if not isinstance(role, str) or not isinstance(content, str):
        raise Unusable(f"message {number}: 'from' and 'value' must be texts")
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    role = standard_role(role)
    if role in CALL_ROLES:
        return {"role": "assistant", "content": None, "tool_calls": _calls(content, number), **rest}
    return {"role": RESULT_ROLES.get(role, role), "content": content, **rest}


def _calls(content: str, number: int) -> list[Row]:
    """ShareGPT's call of a function, which is JSON in the text."""
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        raise Unusable(f"message {number}: the call of a function is not JSON") from None
    calls = told if isinstance(told, list) else [told]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise Unusable(f"message {number}: a call without the name of a function")
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]


def _alpaca(answer: str) -> RowLayout:
    """instruction, input and output: the input stands below the instruction, where there is one."""

    def make(value: Value) -> Row:
        asked, given = text_at(value, "instruction"), _filled(value, ALPACA_INPUTS)
        below = "" if given is None else f"\n\n{text_at(value, given)}"
        return _turns(value, asked + below, text_at(value, answer))

    mapping = f"instruction, and input or context below it, become user, {answer} assistant"
    return RowLayout("Alpaca", mapping, ("instruction", *ALPACA_INPUTS, answer, *SYSTEM), make)


def _pair(title: str, prompt: str, answer: str) -> RowLayout:
    def make(value: Value) -> Row:
        if value.get("label") is False:
            raise Unusable("'label' is false: this answer is not wanted")
        if isinstance(value.get(prompt), list) and isinstance(value.get(answer), list):
            return _joined(value, prompt, answer)
        return _turns(value, text_at(value, prompt), text_at(value, answer))

    mapping = f"{prompt} becomes user, {answer} assistant"
    return RowLayout(title, mapping, (prompt, answer, "label", *SYSTEM, *TOOLS), make)


def _joined(value: Value, prompt: str, answer: str) -> Row:
    """TRL's conversations in two parts, of which the second is learnt."""
    said = [_message(message, number) for number, message in enumerate(value[prompt], 1)]
    for message in said:
        if message.get("role") == "assistant":
            message["weight"] = 0
    answered = [_message(message, number) for number, message in enumerate(value[answer], len(said) + 1)]
    tools = _filled(value, TOOLS)
    return {
        "messages": [*_system(value), *said, *answered],
        **({} if tools is None else {tools: value[tools]}),
    }


def _turns(value: Value, asked: str, answered: str) -> Row:
    turns = {"user": asked, "assistant": answered}
    return {"messages": [*_system(value), *({"role": role, "content": text} for role, text in turns.items())]}
