"""What `fetch` leaves in a model's folder once all of it is there and checked: where it came from, and every digest.

`FETCHED.json` has `source` as the recipe named it, `revision` (the commit that it meant), `licence` and `files`: for
each name `bytes` and `sha256`, or `git_sha1` (of git's blob) for what the Hub keeps in git itself. The folder can so be
checked without the Hub, on any machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mlx_empire.disk import replace_private
from mlx_empire.errors import UserError
from mlx_empire.recipe.schema import Recipe
from mlx_empire.recipe.source import how_to_fetch

RECORD = "FETCHED.json"
PIECE_BYTES = 16 << 20

Record = Mapping[str, Any]


def fetch_record(folder: Path) -> Record | None:
    """What stands in a folder's FETCHED.json; None without one that can be read."""
    with suppress(OSError, ValueError, RecursionError):
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if isinstance(record, dict) and isinstance(record.get("files"), dict):
            return record
    return None


def write_record(folder: Path, record: Record) -> None:
    """Leave the record in a folder that has all of it. OSError."""
    replace_private(folder / RECORD, json.dumps(record, indent=1) + "\n", durable=True)


def source_of(recipe: Recipe) -> str | None:
    """`owner/name@revision` of the model: the commit that was fetched, else what the recipe says; None: not known."""
    record = fetch_record(recipe.model.path)
    if (
        record is not None
        and isinstance(record.get("source"), str)
        and isinstance(record.get("revision"), str)
    ):
        return f"{record['source'].partition('@')[0]}@{record['revision']}"
    return recipe.model.source


def refuse_other_source(recipe: Recipe) -> None:
    """UserError where the folder was fetched from another place than the recipe names."""
    record, source = fetch_record(recipe.model.path), recipe.model.source
    if record is not None and source is not None and record.get("source") != source:
        raise UserError(
            f"model.source: {source}: {recipe.model.path} was fetched from {record.get('source')}; fetch it again, "
            "or name another model.path"
        )


@contextmanager
def naming_the_fetch(recipe: Recipe) -> Iterator[None]:
    """Around reading the model's folder: an error of one that is not there, or not whole, names the command."""
    try:
        yield
    except UserError as error:
        folder = recipe.model.path
        fetched = recipe.model.source is not None and fetch_record(folder) is None
        if fetched or not (folder / "config.json").exists():
            raise type(error)(f"{error}; {how_to_fetch(recipe)}") from None
        raise


def differing(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The names in `files` that are not in the folder as they should be, and why. Where there is any, the folder loses
    its record. A file is read only where its size is right. OSError where the record cannot be removed.
    """
    found = {}
    for name, expected in files.items():
        try:
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                found[name] = f"has {size} bytes and not {expected['bytes']}"
                continue
            kind, digest = _digest(folder / name, expected)
        except OSError as error:
            found[name] = error.strerror or str(error)
            continue
        if digest != expected[kind]:
            found[name] = f"{kind} {digest[:16]}... and not {expected[kind][:16]}..."
    if found:
        (folder / RECORD).unlink(missing_ok=True)
    return found


def _digest(path: Path, expected: Mapping[str, Any]) -> tuple[str, str]:
    """(which digest is known, what it is here)."""
    kind = "sha256" if "sha256" in expected else "git_sha1"
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % expected["bytes"])  # noqa: S324
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return kind, digest.hexdigest()
