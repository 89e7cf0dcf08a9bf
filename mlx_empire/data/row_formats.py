"""Decides what kind of row a data file has (`data.format`) and refuses rows that are not of that kind.

What is inside a conversation is read in `data/messages.py`.
"""

from typing import Any

from mlx_empire.data.files import RawRow
from mlx_empire.errors import UserError

KEYS = {
    "chat": ("messages",),
    "completions": ("prompt", "completion"),
    "text": ("text",),
    "tokens": ("tokens",),
}
# A key that gives another tool's format away, and what to do about it.
FOREIGN = {
    "conversations": "'conversations' is ShareGPT's format; rename it to messages, and in it from and value to "
    "role and content",
    "instruction": "'instruction' is Alpaca's format; write its instruction (and input below it) as prompt, and its "
    "output as completion",
    "chosen": "'chosen' is a format of preferences; this learns answers: keep the chosen one, as messages or as prompt "
    "and completion",
    "input_ids": "'input_ids' are tokens that another tool made; rename them to tokens (all count), or give the "
    "conversation as messages",
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
    for key, remedy in FOREIGN.items():
        if key in row.value:
            raise UserError(f"{row.where}: {remedy}")
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
    if data_format == "tokens":
        _check_tokens(row.where, row.value["tokens"])
    elif data_format != "chat":  # conversations are checked as they are read (data/messages.py)
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
