"""Decides how text files of people are read, how a new one is written, how they are quoted, and what is YAML.

Recipes and hostfiles share this: a size limit, UTF-8, no surprises from directories or devices.

YAML is one plain document of mappings, lists and scalars, with the numbers of YAML 1.2. PyYAML alone follows YAML
1.1, where `1e-5` is a string, `on` is a boolean, a repeated key silently wins and aliases can blow a short file up to
gigabytes. This module builds the value from PyYAML's parser events instead: every key keeps its line, and anchors,
aliases, tags, repeated keys, deep nesting and several documents are refused. Scalars follow the core schema of YAML
1.2.2, section 10.3.2 (https://yaml.org/spec/1.2.2/).
"""

import json
import math
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import yaml

from mlx_empire.disk import create_private
from mlx_empire.errors import UserError

MAX_QUOTED, MAX_LINE = 60, 200


def one_line(text: str) -> str:
    """`text` with every character that a terminal would not print replaced by its escape; never a line
    break.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def first_line(text: str) -> str:
    """The first line of a text, escaped and cut, as a part of a one-line message."""
    return one_line((text.strip().splitlines() or [""])[0][:MAX_LINE])


def words_of(error: BaseException) -> str:
    """What an error of another library says, in one line; its kind where it says nothing."""
    return first_line(str(error)) or type(error).__name__


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


KeyPath = tuple[str, ...]

MAX_DEPTH = 6
_MAX_DIGITS = 40
_INTEGER = re.compile(r"[-+]?[0-9]+", re.ASCII)
_OCTAL_OR_HEX = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+", re.ASCII)
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", re.ASCII)
_SPECIAL = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **{sign + name: float(sign + "inf") for sign in ("", "+", "-") for name in (".inf", ".Inf", ".INF")},
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


def scalar(text: str) -> object:
    """The value of an unquoted scalar: None, bool, int, float or str. ValueError for more digits than make
    sense.
    """
    if text in _SPECIAL:
        return _SPECIAL[text]
    is_integer = _INTEGER.fullmatch(text) or _OCTAL_OR_HEX.fullmatch(text)
    if not is_integer and not _FLOAT.fullmatch(text):
        return text
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} characters")
    if not is_integer:
        return float(text)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def parse_yaml(text: str, where: str) -> tuple[object, dict[KeyPath, int]]:
    """The value of the one YAML document in `text`, and the line (from 1) of every key and list item by its
    path.

    `where` begins every message. Raises UserError, one line, for anything that is not plain YAML. An empty
    document is None.
    """
    builder = _Builder(where)
    try:
        return builder.document(yaml.parse(text, Loader=yaml.SafeLoader)), builder.lines
    except UserError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = one_line(error.problem or error.context or "cannot be parsed")
        raise UserError(f"{where}:{mark.line + 1 if mark else 1}: not valid YAML: {message}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = f"U+{ord(error.character):04X}" if isinstance(error.character, str) else error.character
        character = f"U+{character:04X}" if isinstance(character, int) else character
        raise UserError(f"{where}:{line}: not valid YAML: it contains the character {character}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # PyYAML leaks these, e.g. on "\UFFFFFFFF"
        raise UserError(f"{where}: not valid YAML: {quote(str(error))}") from None


def _line(event: yaml.Event) -> int:
    assert event.start_mark is not None, "events that come from text have marks"
    return event.start_mark.line + 1


class _Builder:
    """Turns parser events into dicts, lists and scalars, refusing what recipes have no use for."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.lines: dict[KeyPath, int] = {}

    def refuse(self, event: yaml.Event, message: str) -> UserError:
        return UserError(f"{self.where}:{_line(event)}: {message}")

    def document(self, events: Iterator[yaml.Event]) -> object:
        value, documents = None, 0
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self.refuse(event, "a second YAML document begins; keep one document in the file")
                value = self.node(next(events), events, ())
        return value

    def node(self, event: yaml.Event, events: Iterator[yaml.Event], path: KeyPath) -> object:
        self.lines.setdefault(path, _line(event))
        if isinstance(event, yaml.AliasEvent):
            raise self.refuse(
                event, f"YAML alias *{one_line(str(event.anchor)[:40])}; write the value out instead"
            )
        assert isinstance(event, yaml.ScalarEvent | yaml.SequenceStartEvent | yaml.MappingStartEvent)
        if event.anchor is not None:
            raise self.refuse(
                event, f"YAML anchor &{one_line(event.anchor[:40])}; write the value out instead"
            )
        if event.tag is not None:
            raise self.refuse(event, f"YAML tag {one_line(event.tag[:40])}; write the plain value instead")
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event)
        if len(path) >= MAX_DEPTH:
            raise self.refuse(event, f"nested deeper than {MAX_DEPTH} levels; a recipe has sections and keys")
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(events, path)
        return self.mapping(events, path)

    def scalar(self, event: yaml.ScalarEvent) -> object:
        if event.style is not None:  # quoted or block text is always a string
            return event.value
        try:
            return scalar(event.value)
        except ValueError as error:
            raise self.refuse(event, f"{error}; write a shorter number") from None

    def sequence(self, events: Iterator[yaml.Event], path: KeyPath) -> list[object]:
        items: list[object] = []
        for event in events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            items.append(self.node(event, events, (*path, str(len(items)))))
        return items

    def mapping(self, events: Iterator[yaml.Event], path: KeyPath) -> dict[str, object]:
        items: dict[str, object] = {}
        for event in events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            if not isinstance(event, yaml.ScalarEvent) or event.anchor is not None or event.tag is not None:
                raise self.refuse(event, "a key must be a plain word")
            key_path = (*path, event.value)
            if event.value in items:
                name = one_line(".".join(key_path)[:80])
                first = self.lines[key_path]
                raise self.refuse(
                    event, f"{name}: this key stands on line {first} already; keep one of the two"
                )
            self.lines[key_path] = _line(event)
            items[event.value] = self.node(next(events), events, key_path)
        return items


def write_new_text(out: Path, text: str) -> None:
    """Write a file that `--out` names, private; what is there already stays. UserError where it cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with create_private(out) as file:
            file.write(text.encode())
    except FileExistsError:
        raise UserError(
            f"--out: {out}: is there already, and is left as it is; choose another name"
        ) from None
    except OSError as error:
        raise UserError(f"--out: {out}: {error.strerror}; choose a file that can be written") from None
