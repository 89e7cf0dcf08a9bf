"""Decides how small text files written by people are read, and how their contents are quoted in a one-line
message.

Recipes and hostfiles share this: a size limit, UTF-8, no surprises from directories or devices.
"""

import json
import math
import os
import stat
import unicodedata
from pathlib import Path

from mlx_empire.errors import UserError

MAX_QUOTED = 60


def one_line(text: str) -> str:
    """`text` with every character that a terminal would not print replaced by its escape; never a line
    break.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def printable(text: str) -> bool:
    """Whether `text` has no control characters, line separators or halves of surrogate pairs."""
    return not any(unicodedata.category(c) in ("Cc", "Cs", "Cn", "Zl", "Zp") for c in text)


def quote(value: object) -> str:
    """`value` as the user would write it in YAML, on one line, cut at `MAX_QUOTED` characters."""
    if isinstance(value, float) and not math.isfinite(value):
        text = ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    elif value is None or isinstance(value, bool | int | float):
        text = json.dumps(value)
    elif isinstance(value, str):
        return f"'{one_line(value[:MAX_QUOTED])}{'...' if len(value) > MAX_QUOTED else ''}'"
    else:
        text = one_line(json.dumps(value, default=str, ensure_ascii=False))
    return text if len(text) <= MAX_QUOTED else text[:MAX_QUOTED] + "..."


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a FIFO must not block us


def read_small_text(path: Path, kind: str, max_bytes: int, remedy: str) -> str:
    """The UTF-8 text of the regular file `path`, byte-order mark and all.

    `kind` ("recipe", "hostfile") and `remedy` go into the messages. Raises UserError (one line that begins
    with the path) when the file is missing, not a regular file, unreadable, larger than `max_bytes` or not
    UTF-8.
    """
    where = one_line(str(path))
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{where}: not a regular file; {remedy}")
            raw = file.read(max_bytes + 1)
    except IsADirectoryError:
        raise UserError(f"{where}: a directory, not a {kind}; {remedy}") from None
    except OSError as error:
        raise UserError(f"{where}: cannot read this {kind} ({error.strerror or error}); {remedy}") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: not a possible path ({error}); {remedy}") from None
    if len(raw) > max_bytes:
        raise UserError(f"{where}: larger than {max_bytes // 1024} KiB, so not a {kind}; {remedy}")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = raw[error.start]
        raise UserError(f"{where}:{line}: byte 0x{byte:02x} is not UTF-8; save the {kind} as UTF-8") from None
