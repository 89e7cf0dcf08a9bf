"""Decides where the rows of a conversion come from: files that training reads, JSON arrays, CSV, data sets of the Hub.

Every row keeps its place: the line of its file on which it begins, or its number in a table or a data set.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import httpx2

from mlx_empire.data.files import (
    SUFFIXES,
    TABLES,
    VALID_NAMES,
    RawRow,
    Refuse,
    Source,
    locate,
    optional_package,
)
from mlx_empire.errors import UnreachableError, UserError
from mlx_empire.recipe.text import words_of

HUB_NAME = re.compile(
    r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[A-Za-z0-9][\w./-]{0,95})?", re.ASCII
)
ARRAYS = (".json", ".jsonl")  # suffixes of files that may hold one array
UNREACHED = (OSError, httpx2.HTTPError)  # of huggingface_hub, whose own errors are OSErrors
# Of `datasets` beside ValueErrors: a script, a codec or a package that it would need; NotImplementedError among them.
UNSUPPORTED = (RuntimeError, ImportError)
CONVERTED = "refs/convert/parquet"  # the revision of a data set to which the Hub itself has converted it
ONE_BY_ONE = "fetch the data set and convert its files one by one"
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
    train, valid = locate(path, (*SUFFIXES, *TABLES))
    return Foreign({"train": _rows_of(train), **({} if valid is None else {"valid": _rows_of(valid)})})


def _rows_of(source: Source) -> Rows:
    """The rows of a split, each file of which may be a table or an array."""
    if source.kind == "arrow":
        return source.rows
    every = [_whole(file) for file in source.files]
    return lambda refuse: chain.from_iterable(rows(refuse) for rows in every)


def _whole(file: Path) -> Rows:
    if file.suffix in TABLES:
        return lambda refuse: _table_rows(file, refuse)
    if file.suffix in ARRAYS and _is_array(file):
        return lambda refuse: _array_rows(file, refuse)
    return Source(file.suffix, file, (file,)).rows


def _is_array(file: Path) -> bool:
    with _reading(file), file.open("rb") as content:
        beginning = content.read(64)
    return beginning.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Around reading a file: UserError where it cannot be read, or not as text."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}; check who may read it") from None


def _array_rows(file: Path, refuse: Refuse) -> Iterator[RawRow]:
    """The objects of a JSON array one by one; an object's place is the line on which it begins."""
    with _reading(file):
        text = file.read_bytes().decode("utf-8-sig")
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")
    at, line, counted = text.index("[") + 1, 1, 0
    while True:
        at = blank.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        line, counted = line + text.count("\n", counted, at), at
        where = f"{file}:{line}"
        if text[at : at + 1] == "]":
            if text[at + 1 :].strip():
                raise UserError(
                    f"{where}: the array ends here, and more follows; make one array of all of it"
                )
            return
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
    """The rows of a CSV file, whose first line names the columns. Between cells stand tabs (.tsv), commas or semicolons
    where that line has no comma: so spreadsheets write it where numbers have a decimal comma."""
    csv.field_size_limit(LARGEST_FIELD)
    with _reading(file), file.open(encoding="utf-8-sig", newline="") as lines:
        head = lines.readline()
        lines.seek(0)
        comma = ";" if ";" in head and "," not in head else ","
        reader = csv.reader(lines, delimiter="\t" if file.suffix == ".tsv" else comma, strict=True)
        names: list[str] = []
        first = 1  # of the lines that the next row takes; a line without cells is a row without any
        try:
            for cells in reader:
                where, first = f"{file}:{first}", reader.line_num + 1
                if not names:
                    names = cells
                elif len(cells) > len(names):
                    told = f"{where}: more cells than columns; put quotation marks around commas"
                    refuse(where, UserError(told))
                elif cells:
                    yield RawRow(where, dict(zip_longest(names, cells)))
        except csv.Error as error:
            raise UserError(f"{file}:{reader.line_num}: not CSV ({error}); save the file again") from None


def _hub(named: str, subset: str | None) -> Foreign:
    """The splits of a data set on the Hub, read as they come, without a copy on this disk."""
    name, _, revision = named.partition("@")
    datasets = optional_package("datasets", Path(named))
    broken = datasets.exceptions.DatasetsError
    try:
        found = datasets.load_dataset(name, subset, revision=revision or None, streaming=True)
    except ValueError as error:  # most often: that a subset must be named, and which there are
        raise UserError(f"{named}: {words_of(error)}; --subset NAME says which") from None
    except UNSUPPORTED as error:
        raise _unread(named, error, f"try {name}@{CONVERTED}, or {ONE_BY_ONE}") from None
    except (*UNREACHED, broken) as error:
        raise _unreached(named, error) from None
    valid = next((split for split in VALID_NAMES if split in found), None)
    if "train" not in found:
        raise UserError(f"{named}: no split train; it has {', '.join(found)}")
    splits = {"train": _stream(f"{named}/train", found["train"], broken)}
    if valid is not None:
        splits["valid"] = _stream(f"{named}/{valid}", found[valid], broken)
    return Foreign(splits, tuple(split for split in found if split not in ("train", valid)))


def _stream(named: str, split: Iterable[dict[str, Any]], broken: type[Exception]) -> Rows:
    """The rows of a split. `broken`: what `datasets` raises where rows differ, beside ValueError and TypeError."""

    def rows(refuse: Refuse) -> Iterator[RawRow]:
        number = 0
        try:
            for number, value in enumerate(split, 1):
                yield RawRow(f"{named}:{number}", value)
        except UNREACHED as error:
            raise _unreached(named, error) from None
        except (*UNSUPPORTED, ValueError, TypeError, broken) as error:
            raise _unread(f"{named}:{number + 1}", error, ONE_BY_ONE) from None

    return rows


def _unread(where: str, error: BaseException, remedy: str) -> UserError:
    if isinstance(error, ImportError):  # it says which package; its files need that, too
        remedy = f"install that beside `datasets`, by {sys.executable} -m pip install"
    return UserError(f"{where}: `datasets` cannot read this ({words_of(error)}); {remedy}")


def _unreached(named: str, error: BaseException) -> UserError | UnreachableError:
    absent = isinstance(error, FileNotFoundError) or "NotFound" in type(error).__name__
    if absent:
        return UserError(
            f"{named}: neither a file here nor a data set that the Hub shows you ({words_of(error)}); look for "
            "typing errors, or `hf auth login`"
        )
    return UnreachableError(f"{named}: the Hub was not reached ({words_of(error)}); try again")
