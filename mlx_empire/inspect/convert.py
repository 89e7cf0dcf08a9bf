"""Writes other tools' rows as ours, and says what was mapped, what was left out and what was dropped, by file and line.

Decides that nothing is guessed and nothing lost in silence: columns that no message has are counted, rows that training
would refuse are named, a file that is there is never replaced, and what is written is whole or not there: all splits
are, or none is.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from mlx_empire.comm.failure import guard
from mlx_empire.data.files import RawRow
from mlx_empire.disk import create_private, draft_of
from mlx_empire.errors import UserError
from mlx_empire.inspect.findings import row_count
from mlx_empire.inspect.layouts import RowLayout, Unusable, is_filled, layout_of
from mlx_empire.inspect.look import Tell, Telling, counting
from mlx_empire.inspect.tables import Foreign, Rows, foreign_data
from mlx_empire.recipe.text import one_line

# What file systems answer that have no second names of a file, as exFAT.
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
PRINTED, MOST_KEPT = 10, 100_000  # dropped rows: on the terminal, and with reasons at all


@dataclass
class Converted:
    """What became of a split: `left`: keys that were not carried, in how many rows; `dropped`: places and reasons."""

    name: str
    file: Path
    layout: RowLayout | None = None
    written: int = 0
    left: Counter[str] = field(default_factory=Counter)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    dropped_count: int = 0

    def drop(self, where: str, reason: object) -> None:
        """One row less."""
        self.dropped_count += 1
        if len(self.dropped) < MOST_KEPT:
            self.dropped.append((where, str(reason).removeprefix(f"{where}: ")))


def convert_command(options: argparse.Namespace) -> int:
    """What the command line asks for; returns the exit code."""
    with guard(None):
        source, out = options.recipe, options.convert
        found = foreign_data(source, options.subset)
        files = targets(found, out)
        with counting() as tell:
            done = converted(found.splits, files, options.columns, tell)
        if options.json:
            print(json.dumps(conversion_document(source, out, found, done), indent=1))
        else:
            print(*conversion_lines(source, out, found, done), sep="\n")
        return 0
    raise AssertionError("guard always leaves")


def targets(found: Foreign, out: Path) -> dict[str, Path]:
    """The file of each split. UserError where one is there, or where two splits would go into one file."""
    if out.suffix == ".jsonl":
        if len(found.splits) > 1:
            raise UserError(f"--convert: {out}: a file for {' and '.join(found.splits)}; name a folder")
        files = {"train": out}
    else:
        files = {name: out / f"{name}.jsonl" for name in found.splits}
    for file in files.values():
        if os.path.lexists(file):
            raise UserError(f"--convert: {file}: is there already, and is left as it is; choose another name")
    return files


def converted(
    splits: Mapping[str, Rows], files: Mapping[str, Path], columns: Sequence[str] | None, telling: Telling
) -> list[Converted]:
    """Write all splits, or none. UserError where of one no row can be used, or where a file cannot be written."""
    done, placed, file = [], list[Path](), Path()
    drafts = {name: file.with_name(draft_of(file.name)) for name, file in files.items()}
    try:
        for name, rows in splits.items():
            file = files[name]
            done.append(_drafted(name, rows, file, drafts[name], columns, telling(f"rows of {name}")))
        for name, file in files.items():
            _place(drafts[name], file)
            placed.append(file)
    except OSError as error:
        _remove(placed)
        raise UserError(
            f"--convert: {file}: {error.strerror or error}; choose a file that can be written"
        ) from None
    finally:
        _remove(drafts.values())
    return done


def _drafted(
    name: str, rows: Rows, file: Path, draft: Path, columns: Sequence[str] | None, tell: Tell
) -> Converted:
    """Write one split beside its place. OSError; UserError where none of its rows can be used."""
    done = Converted(name, file)
    read = rows(done.drop)
    file.parent.mkdir(parents=True, exist_ok=True)
    draft.unlink(missing_ok=True)
    with create_private(draft) as out:
        for line in _usable(done, read, columns):
            out.write(line + b"\n")
            done.written += 1
            if not done.written % 1000:
                tell(done.written)
    if not done.written and not done.dropped_count:
        raise UserError(f"--convert: {name}: no rows; put at least one there")
    if not done.written:
        first = ": ".join(done.dropped[0])
        raise UserError(
            f"--convert: {name}: of {row_count(done.dropped_count)} none can be used (the first, {first})"
        )
    return done


def _place(draft: Path, file: Path) -> None:
    """Give a whole draft its name; OSError where there is a file of that name by now, which is left as it is."""
    try:
        os.link(draft, file)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        create_private(file).close()  # it is ours from here on
        draft.rename(file)


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        with suppress(OSError):  # it may not be there, nor its folder
            file.unlink(missing_ok=True)


def _usable(done: Converted, read: Iterator[RawRow], columns: Sequence[str] | None) -> Iterator[bytes]:
    """The lines to write."""
    first = next(read, None)
    if first is None:
        return
    done.layout = layout_of(first, columns)
    for raw in chain([first], read):
        filled = (key for key, value in raw.value.items() if is_filled(value))
        done.left.update(key for key in filled if key not in done.layout.keys)
        try:
            line = json.dumps(done.layout.row(raw), ensure_ascii=False).encode()
        except (Unusable, TypeError, ValueError) as error:
            done.drop(raw.where, error)
        else:
            yield line


def conversion_document(source: Path, out: Path, found: Foreign, done: Sequence[Converted]) -> dict[str, Any]:
    """What was done, as JSON."""
    return {
        "data": str(source),
        "left_out": list(found.left_out),
        "parts": [
            {
                "name": one.name,
                "file": str(one.file),
                "layout": one.layout.title if one.layout else None,
                "mapping": one.layout.mapping if one.layout else None,
                "written": one.written,
                "not_carried": dict(one.left.most_common()),
                "dropped": one.dropped_count,
                "dropped_at": [{"where": where, "says": reason} for where, reason in one.dropped],
            }
            for one in done
        ],
        "next": _next(out),
    }


def conversion_lines(source: Path, out: Path, found: Foreign, done: Sequence[Converted]) -> Iterator[str]:
    """What was done, for a person."""
    for one in done:
        assert one.layout is not None, "a split without rows is refused"
        yield f"written: {one.file}, {row_count(one.written)}"
        yield f"  read as {one.layout.title}: {one_line(one.layout.mapping)}"
        if one.left:
            listed = ", ".join(f"{one_line(str(key))} ({count:,})" for key, count in one.left.most_common(12))
            yield f"  not carried, with the rows that have it: {listed}"
        if one.dropped_count:
            yield f"  dropped: {row_count(one.dropped_count)}"
            yield from (f"    {one_line(where)}: {one_line(why)}" for where, why in one.dropped[:PRINTED])
            if one.dropped_count > PRINTED:
                yield f"    … {one.dropped_count - PRINTED:,} more: --json has them"
    if found.left_out:
        yield f"left out: {', '.join(found.left_out)} of {source}"
    yield f"next:\n  {_next(out)}"


def _next(out: Path) -> str:
    return f"mlx-empire inspect {shlex.quote(str(out))} --model FOLDER"
