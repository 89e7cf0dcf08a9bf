"""Decides which files of `data.path` are the training and the validation split, and reads them row by row.

A path is one file, a folder with `train.*` (and `valid.*`), one of `.txt` documents, a Hugging Face datasets folder
written by `save_to_disk`, or one as their Hub has it, where a split lies in numbered parts. Reading is strict: a line
that cannot be used is named by file and line. Which kind of row they are is told by `data/row_format.py`.
"""

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_empire.errors import POINTER, UserError, is_pointer
from mlx_empire.recipe.text import words_of

SUFFIXES = (".jsonl", ".json", ".txt", ".parquet")
TABLES = (".csv", ".tsv")  # read only to be converted
VALID_NAMES = ("valid", "validation")
# A part of a split on the Hugging Face Hub, with a digest or without: train-00000-of-00002-1234567890abcdef.parquet
PART = re.compile(r"(?P<name>[a-z]+)-(?P<number>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]+)?\.[a-z]+")
EXPECTED = (
    "train.jsonl (and valid.jsonl), parts such as train-00000-of-00002.parquet, .txt files or a folder written by "
    "datasets' save_to_disk"
)

Refuse = Callable[[str, UserError], None]  # told of a line that cannot be used: its place, and why


@dataclass(frozen=True)
class RawRow:
    """One row as the file has it; `where` is `file:line`. `more`: its text goes on in the next one."""

    where: str
    value: dict[str, Any]
    more: bool = False

    @property
    def converting(self) -> str:
        """The command that makes rows that we read of the file where this one stands."""
        return converting(Path(self.where.rpartition(":")[0]))


def converting(path: Path) -> str:
    """The command that makes rows that we read of what lies at `path`."""
    return f"mlx-empire inspect {shlex.quote(str(path))} --convert OUT"


@dataclass(frozen=True)
class Source:
    """The files of one split. `kind` is the suffix that says how to read them; `arrow`: a datasets folder."""

    kind: str
    path: Path
    files: tuple[Path, ...]

    def rows(self, refuse: Refuse | None = None) -> Iterator[RawRow]:
        """Yield every row in file order. Errors: UserError with file and line; with `refuse` that is told of each line
        or document that cannot be used, and reading goes on."""
        if self.kind == "arrow":
            yield from _arrow_rows(self.path)
        for file in self.files if self.kind != "arrow" else ():
            try:
                if self.kind == ".txt":
                    yield from _text_document(file, refuse)
                elif self.kind == ".parquet":
                    yield from _parquet_rows(file)
                else:
                    yield from _json_lines(file, refuse)
            except OSError as error:
                raise unreadable(file, error) from error


def unreadable(file: Path, error: OSError) -> UserError:
    """What a person is told of a file that cannot be read."""
    return UserError(f"{file}: cannot be read: {error.strerror or error}; check data.path")


def not_utf8(where: str, error: UnicodeDecodeError) -> UserError:
    """What a person is told of bytes that are no text."""
    return UserError(f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8")


def locate(path: Path, suffixes: Sequence[str] = SUFFIXES) -> tuple[Source, Source | None]:
    """Find the training source and, where there is one, the validation source of `data.path`.

    suffixes: of the files that are taken, `TABLES` too where they are to be converted. Errors: UserError when the path
    does not exist, holds nothing usable, or offers two files for one split.
    """
    if path.is_file():
        if path.suffix not in suffixes:
            other = f"; `{converting(path)}` makes one of it" if path.suffix in TABLES else ""
            raise UserError(
                f"data.path {path}: unknown suffix {path.suffix!r}; use one of {', '.join(suffixes)}{other}"
            )
        return Source(path.suffix, path, (path,)), None
    if not path.is_dir():
        raise UserError(f"data.path {path}: no such file or folder; give a file or a folder with {EXPECTED}")
    if (path / "dataset_dict.json").is_file():
        train = _arrow_source(path / "train")
        valid = next((v for v in VALID_NAMES if (path / v).is_dir()), None)
        return train, _arrow_source(path / valid) if valid else None
    if (path / "state.json").is_file():
        return _arrow_source(path), None
    whole, held_out = _split(path, ("train",), suffixes), _split(path, VALID_NAMES, suffixes)
    if whole is not None:
        return whole, held_out
    known = held_out.files if held_out else ()
    documents = tuple(sorted(file for file in path.glob("*.txt") if file not in known))
    if not documents:
        tables = any((path / f"train{suffix}").is_file() for suffix in TABLES)
        other = f"; `{converting(path)}` makes them of its tables" if tables else ""
        raise UserError(f"data.path {path}: nothing to train on in this folder; it needs {EXPECTED}{other}")
    return Source(".txt", path, documents), held_out


def files_there(paths: Iterable[Path]) -> list[Path]:
    """The files of both splits of each of `paths`. Where nothing that can be read lies there are none; whoever reads
    says so.
    """
    found: list[Path] = []
    for path in paths:
        with suppress(UserError):
            found += [file for source in locate(path) if source is not None for file in source.files]
    return found


def _split(folder: Path, names: Sequence[str], suffixes: Sequence[str]) -> Source | None:
    """A split's one file or its numbered parts, here or in the folder `data`."""
    files = [folder / f"{n}{s}" for n in names for s in suffixes]
    found = [Source(file.suffix, file, (file,)) for file in files if file.is_file()]
    found += [source for place in (folder, folder / "data") for source in _in_parts(place, names, suffixes)]
    if len(found) > 1:
        listed = " and ".join(source.path.name for source in found)
        raise UserError(f"data.path {folder}: {listed} are the same split; keep one of them")
    return found[0] if found else None


def _in_parts(folder: Path, names: Sequence[str], suffixes: Sequence[str]) -> Iterator[Source]:
    """Splits whose parts are all there, one after the other. Errors: UserError where one is missing."""
    parts: dict[tuple[str, int], list[Path]] = {}
    for file in sorted(folder.glob("*-of-*")):
        part = PART.fullmatch(file.name)
        if part and part["name"] in names and file.suffix in suffixes:
            parts.setdefault((file.suffix, int(part["count"])), []).append(file)
    for (suffix, count), files in parts.items():
        numbers = [int(file.name.split("-")[1]) for file in files]
        if numbers != list(range(count)):
            raise UserError(
                f"data.path {folder}: of the {count} parts that {files[0].name} belongs to there are those with the "
                f"numbers {', '.join(map(str, numbers)):.200}; bring each once"
            )
        yield Source(suffix, files[0], tuple(files))


def _arrow_source(folder: Path) -> Source:
    if not (folder / "state.json").is_file():
        raise UserError(f"data.path {folder}: no split saved there; write it with datasets' save_to_disk")
    return Source("arrow", folder, tuple(sorted(f for f in folder.rglob("*") if f.is_file())))


def _json_lines(file: Path, refuse: Refuse | None) -> Iterator[RawRow]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                value = _json_object(where, file, line, number)
            except UserError as error:
                if refuse is None or isinstance(error, _ArrayError):
                    raise
                refuse(where, error)
            else:
                yield RawRow(where, value)


def _json_object(where: str, file: Path, line: bytes, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise not_utf8(where, error) from error
    except json.JSONDecodeError as error:
        if number == 1 and is_pointer(line):
            raise UserError(f"{where}: {POINTER}") from error
        if line.lstrip(b"\xef\xbb\xbf \t").startswith(b"[") and number == 1:
            raise _ArrayError(where, file) from error
        reason = f"{error.msg} at column {error.colno}"
        raise UserError(f"{where}: not JSON ({reason}); write one JSON object a line") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 1,000 nested brackets
        raise UserError(f"{where}: not usable JSON ({error}); simplify the row") from error
    if isinstance(value, list) and number == 1:
        raise _ArrayError(where, file)
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise UserError(f"{where}: a JSON {kind}, not an object; write one JSON object a line")
    return value


class _ArrayError(UserError):
    """A file that is one JSON array: none of its lines is a row."""

    def __init__(self, where: str, file: Path) -> None:
        super().__init__(
            f"{where}: a JSON array; write one JSON object a line: `{converting(file)}` does that"
        )


def _text_document(file: Path, refuse: Refuse | None) -> Iterator[RawRow]:
    """A `.txt` file is one document: it is split into rows later, and no context ends with a line."""
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        where = f"{file}:{line}"
        told = not_utf8(where, error)
        if refuse is None:
            raise told from error
        refuse(where, told)
    else:
        yield RawRow(f"{file}:1", {"text": text})


def optional_package(name: str, path: Path) -> ModuleType:
    """Import `datasets` or a part of pyarrow: an extra, because they weigh more than all the rest."""
    try:
        return __import__(name, fromlist=["_"])
    except ImportError as error:
        remedy = f"{sys.executable} -m pip install datasets, or save the data as JSON lines"
        raise UserError(f"{path}: reading it needs the package {name.split('.')[0]!r}; {remedy}") from error


def _arrow_rows(folder: Path) -> Iterator[RawRow]:
    datasets = optional_package("datasets", folder)
    try:
        table = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: not a readable datasets folder ({words_of(error)}); save it again"
        ) from error
    for number, value in enumerate(table):
        yield RawRow(f"{folder}:{number + 1}", value)


def _parquet_rows(file: Path) -> Iterator[RawRow]:
    parquet = optional_package("pyarrow.parquet", file)
    try:
        table = parquet.ParquetFile(file)
    except ValueError as error:  # pyarrow's ArrowInvalid
        with file.open("rb") as stream:
            if is_pointer(stream.readline(80)):
                raise UserError(f"{file}: {POINTER}") from error
        raise UserError(f"{file}: not a readable parquet file ({words_of(error)}); save it again") from error
    number = 0
    for batch in table.iter_batches(batch_size=1024):
        for value in batch.to_pylist():
            number += 1
            yield RawRow(f"{file}:{number}", value)
