"""Decides what kind of row a data file has (`data.format`) and refuses rows that are not of that kind."""

from typing import Any

from mlx_empire.data.files import RawRow
from mlx_empire.errors import UserError

KEYS = {
    "chat": ("messages",),
    "completions": ("prompt", "completion"),
    "text": ("text",),
    "tokens": ("tokens",),
}


def detect_format(row: RawRow) -> str:
    """Name the format of a file from the keys of its first row. Errors: UserError for none or several.

    Several matches are refused, not ranked: a row with both `messages` and a pre-rendered `text` trains
    differently according to which one is read, and only the user knows which is meant.
    """
    found = [name for name, keys in KEYS.items() if all(row.value.get(key) is not None for key in keys)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{row.where}: could be {' or '.join(found)}; say which with data.format")
    wanted = ", ".join("+".join(keys) for keys in KEYS.values())
    has = ", ".join(row.value) or "none"
    raise UserError(f"{row.where}: no known keys (it has {has}); a row needs one of {wanted}")


def check_row(row: RawRow, data_format: str) -> None:
    """Raise UserError unless `row` is a well-formed row of `data_format` (keys there, types right)."""
    for key in KEYS[data_format]:
        if row.value.get(key) is None:
            raise UserError(
                f"{row.where}: no {key!r} in a file of format {data_format}; "
                "give every row the same keys or split the file"
            )
    if data_format == "chat":
        _check_messages(row.where, row.value["messages"], row.value.get("tools"))
    elif data_format == "tokens":
        _check_tokens(row.where, row.value["tokens"])
    else:
        for key in KEYS[data_format]:
            if not isinstance(row.value[key], str):
                kind = type(row.value[key]).__name__
                raise UserError(f"{row.where}: {key!r} is a {kind}; it must be a string")


def _check_tokens(where: str, tokens: Any) -> None:
    if not isinstance(tokens, list):
        raise UserError(f"{where}: 'tokens' is a {type(tokens).__name__}; it must be a list of integers")
    for position, token in enumerate(tokens):
        if type(token) is not int or not 0 <= token < 2**31:  # a bool is an int to isinstance
            raise UserError(
                f"{where}: token {position} is {token!r:.40}; token ids are integers from 0 to 2^31-1"
            )


def _check_messages(where: str, messages: Any, tools: Any) -> None:
    if not isinstance(messages, list) or not messages:
        remedy = "write a list of {role, content} objects"
        raise UserError(f"{where}: 'messages' is not a list of one message or more; {remedy}")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError(f"{where}: 'tools' must be a list of JSON schemas; remove it or correct it")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            kind = type(message).__name__
            raise UserError(
                f"{where}: message {number} is a {kind}; it must be an object with role and content"
            )
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise UserError(f"{where}: message {number} has no role; use system, user, assistant or tool")
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            raise UserError(f"{where}: message {number} ({role}) has no text; 'content' must be a string")
