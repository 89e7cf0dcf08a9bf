"""What kind of row a file holds, by its keys (`data.format`), and whether a row is one of that kind.

What is inside a conversation is checked as it is read, in `data/messages.py`.
"""

from __future__ import annotations

from typing import Any

from mlx_empire.data.files import RawRow
from mlx_empire.errors import UserError
from mlx_empire.recipe.text import one_line

KEYS = {
    "chat": ("messages",),
    "completions": ("prompt", "completion"),
    "text": ("text",),
    "tokens": ("tokens",),
}


# A key that gives another tool's format away, and what to do about it.
FOREIGN = {
    "conversations": "'conversations' is ShareGPT's format; `{convert}` writes it as messages",
    "instruction": "'instruction' is Alpaca's format; `{convert}` writes it as messages",
    "chosen": "'chosen' is a format of preferences; this learns answers: keep the chosen one, as messages or as prompt "
    "and completion",
    "input_ids": "'input_ids' are tokens that another tool made; rename them to tokens (all count), or give the "
    "conversation as messages",
}


TARGETS = ("labels", "loss_mask")  # by position, beside tokens or messages


RENDERED_AS_TEXT = ("conversations", "instruction", "chosen")  # what a 'text' beside it is a rendering of


def detect_format(row: RawRow) -> str:
    """Name the format of a file from the keys of its first row. Errors: UserError for none or several.

    Several matches are refused, not ranked: a row with both `messages` and a pre-rendered `text` trains
    differently according to which one is read, and only the user knows which is meant.
    """
    found = [name for name, keys in KEYS.items() if all(row.value.get(key) is not None for key in keys)]
    foreign = next((key for key in FOREIGN if row.value.get(key) is not None), None)
    remedy = FOREIGN[foreign].format(convert=row.converting) if foreign else ""
    if found == ["text"] and foreign in RENDERED_AS_TEXT:
        raise UserError(
            f"{row.where}: 'text' stands beside what it was made of: {remedy}; or say data.format: text to learn "
            "every word of 'text', the question too"
        )
    if found == ["completions"] and isinstance(row.value.get("label"), bool):
        raise UserError(
            f"{row.where}: 'label' says whether the completion is wanted, and this learns every one; keep the rows in "
            "which it is true, without 'label', or say data.format: completions to learn all"
        )
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{row.where}: could be {' or '.join(found)}; say which with data.format")
    if remedy:
        raise UserError(f"{row.where}: {remedy}")
    wanted = ", ".join("+".join(keys) for keys in KEYS.values())
    has = ", ".join(map(one_line, row.value)) or "none"
    raise UserError(
        f"{row.where}: no known keys (it has {has:.200}); a row needs one of {wanted}; "
        f"`{row.converting}` makes such rows of many others"
    )


def check_row(row: RawRow, data_format: str) -> None:
    """Raise UserError unless `row` is a well-formed row of `data_format` (keys there, types right)."""
    for key in KEYS[data_format]:
        if row.value.get(key) is None:
            raise UserError(
                f"{row.where}: no {key!r} in a file of format {data_format}; "
                "give every row the same keys or split the file"
            )
    for key in TARGETS if data_format in ("tokens", "chat") else ():
        if isinstance(row.value.get(key), list):
            raise UserError(
                f"{row.where}: {key!r} says which positions are learnt, and is not read: of tokens all are learnt, of "
                f"messages the assistant's ('weight': 0 leaves one out); remove {key!r}, or give messages without it"
            )
    if data_format == "tokens":
        _check_tokens(row.where, row.value["tokens"])
    elif data_format != "chat":  # conversations are checked as they are read (data/messages.py)
        for key in KEYS[data_format]:
            if not isinstance(row.value[key], str):
                kind = type(row.value[key]).__name__
                talk = f" (messages? `{row.converting}` joins them)" if kind == "list" else ""
                raise UserError(f"{row.where}: {key!r} is a {kind}; it must be a string{talk}")


def _check_tokens(where: str, tokens: Any) -> None:
    if not isinstance(tokens, list):
        raise UserError(f"{where}: 'tokens' is a {type(tokens).__name__}; it must be a list of integers")
    for position, token in enumerate(tokens):
        if type(token) is not int or not 0 <= token < 2**31:  # a bool is an int to isinstance
            raise UserError(
                f"{where}: token {position} is {token!r:.40}; token ids are integers from 0 to 2^31-1"
            )
