"""Decides where the rows of a conversion come from: files that training reads, JSON arrays, CSV, data sets of the Hub.

Every row keeps its place: the line of its file on which it begins, or its number in a table or a data set.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from mlx_empire.data.files import TABLES, VALID_NAMES, RawRow, Refuse, Source, locate, optional_package
from mlx_empire.errors import UnreachableError, UserError

HUB_NAME = re.compile(
    r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[A-Za-z0-9][\w./-]{0,95})?", re.ASCII
)
WHOLE = (".json", *TABLES)  # suffixes of files that are not read line by line
LARGEST_FIELD = 1 << 24  # characters in a cell of a CSV file

Rows = Callable[[Refuse], Iterator[RawRow]]


@dataclass(frozen=True)
class Foreign:
    """The splits of another tool's data by our names (train, valid), and those that have no place here."""

    splits: dict[str, Rows]
    left_out: tuple[str, ...] = ()


def foreign_data(path: Path, subset: str | None) -> Foreign:
    """The splits at `path`, a file, a folder, or a data set of the Hub. UserError, UnreachableError."""
    if not path.exists() and HUB_NAME.fullmatch(str(path)):
        return _hub(str(path), subset)
    if subset is not None:
        raise UserError(f"--subset: {path}: only data sets of the Hub have subsets: owner/name")
    if path.is_file() and path.suffix in WHOLE:
        return Foreign({"train": _whole(path)})
    if path.is_dir():
        found = {"train": _only(path, ("train",)), "valid": _only(path, VALID_NAMES)}
        named = {name: _whole(file) for name, file in found.items() if file is not None}
        if "train" in named:
            return Foreign(named)
    train, valid = locate(path)
    return Foreign({"train": train.rows, **({"valid": valid.rows} if valid is not None else {})})


def _only(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The one file of a split in a folder whose suffix is in `WHOLE`, or that of lines beside one."""
    found = [folder / f"{name}{suffix}" for name in names for suffix in (*WHOLE, ".jsonl", ".parquet")]
    found = [file for file in found if file.is_file()]
    if len(found) > 1:
        raise UserError(
            f"{folder}: {' and '.join(file.name for file in found)} are the same split; keep one of them"
        )
    return found[0] if found else None


def _whole(file: Path) -> Rows:
    if file.suffix in TABLES:
        return lambda refuse: _table_rows(file, refuse)
    if file.suffix == ".json" and _is_array(file):
        return lambda refuse: _array_rows(file, refuse)
    return Source(file.suffix, file, (file,)).rows


def _is_array(file: Path) -> bool:
    with file.open("rb") as content:
        return content.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None


def _array_rows(file: Path, refuse: Refuse) -> Iterator[RawRow]:
    """The objects of a JSON array one by one; an object's place is the line on which it begins."""
    text, decoder, blank = _text(file), json.JSONDecoder(), re.compile(r"\s*")
    at, line, counted = text.index("[") + 1, 1, 0
    while True:
        at = blank.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        if text[at : at + 1] == "]":
            return
        line, counted = line + text.count("\n", counted, at), at
        where = f"{file}:{line}"
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({str(error)[:80]}); the array ends here: mend it") from None
        if isinstance(value, dict):
            yield RawRow(where, value)
        else:
            refuse(where, UserError(f"{where}: a JSON {type(value).__name__}, not an object"))
        at = blank.match(text, at).end()  # type: ignore[union-attr]
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "]":
            raise UserError(f"{where}: no comma and no end after this row; mend the array")


def _table_rows(file: Path, refuse: Refuse) -> Iterator[RawRow]:
    """The rows of a CSV file (tabs between its cells: .tsv), whose first line names the columns."""
    csv.field_size_limit(LARGEST_FIELD)
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(
                lines, dialect="excel-tab" if file.suffix == ".tsv" else "excel", strict=True
            )
            where = f"{file}:2"
            for value in reader:
                if None in value:
                    refuse(
                        where,
                        UserError(f"{where}: more cells than columns; put quotation marks around commas"),
                    )
                else:
                    yield RawRow(where, value)
                where = f"{file}:{reader.line_num + 1}"
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num}: not CSV ({error}); save the file again") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None


def _hub(named: str, subset: str | None) -> Foreign:
    """The splits of a data set on the Hub, read as they come, without a copy on this disk."""
    name, _, revision = named.partition("@")
    datasets = optional_package("datasets", Path(named))
    try:
        found = datasets.load_dataset(name, subset, revision=revision or None, streaming=True)
    except ValueError as error:  # most often: that a subset must be named, and which there are
        raise UserError(f"{named}: {_first_line(error)}; --subset NAME says which") from None
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise _unreached(named, error) from None
    valid = next((split for split in VALID_NAMES if split in found), None)
    if "train" not in found:
        raise UserError(f"{named}: no split train; it has {', '.join(found)}")
    splits = {"train": _stream(named, "train", found)}
    if valid is not None:
        splits["valid"] = _stream(named, valid, found)
    return Foreign(splits, tuple(split for split in found if split not in ("train", valid)))


def _stream(named: str, split: str, found: Any) -> Rows:
    def rows(refuse: Refuse) -> Iterator[RawRow]:
        try:
            for number, value in enumerate(found[split], 1):
                yield RawRow(f"{named}/{split}:{number}", value)
        except OSError as error:
            raise _unreached(named, error) from None

    return rows


def _unreached(named: str, error: Exception) -> UserError | UnreachableError:
    absent = isinstance(error, FileNotFoundError) or "NotFound" in type(error).__name__
    if absent:
        return UserError(
            f"{named}: neither a file here nor a data set that the Hub shows you ({_first_line(error)}); look for "
            "typing errors, or `hf auth login`"
        )
    return UnreachableError(f"{named}: the Hub was not reached ({_first_line(error)}); try again")


def _first_line(error: Exception) -> str:
    return next(chain(str(error).splitlines(), [type(error).__name__]))[:200]
