"""How a result folder comes to its place: written beside it in a hidden folder, recorded, and renamed at the end.

Decides whose folders may be replaced (ours, by their record) and that an interrupted export never looks like a
finished one. Folders get mode 0700 whatever the umask.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from mlx_empire import __version__
from mlx_empire.disk import free_bytes, is_full
from mlx_empire.errors import NoRoomError, UserError
from mlx_empire.formats.sidefiles import write_json
from mlx_empire.private_files import sync_folder

RECORD_NAME = "EXPORT.json"  # says that a folder is ours: which files were written, in which layout


def refuse_foreign(out: Path) -> None:
    """UserError unless `out` is absent, an empty folder, or holds only an earlier export of ours."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out}: exists and is not a folder; move it away or choose another place")
    names = _names(out) if out.exists() else set()
    if not names:
        return
    try:
        record: Any = json.loads((out / RECORD_NAME).read_text(encoding="utf-8"))
        ours = str(record["written_by"]).startswith("mlx_empire") and names <= set(record["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        ours = False
    if not ours:
        raise UserError(
            f"{out}: exists and holds files that mlx_empire did not write; move them or export elsewhere"
        )


def _names(folder: Path) -> set[str]:
    """Of all that lies in a folder, also in the folders in it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def require_room(out: Path, needed: int) -> None:
    """NoRoomError unless so many bytes are free where `out` is to be written."""
    free = free_bytes(out.parent)
    if free < needed:
        raise NoRoomError(
            f"{out}: needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free on its disk", needed
        )


def fresh_folder(folder: Path) -> None:
    """Make an empty private folder; what an interrupted export left there goes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove(folder)
    folder.mkdir(mode=0o700)
    folder.chmod(0o700)


def publish(temporary: Path, out: Path, layout: str, notes: Sequence[str]) -> None:
    """Record which files were written, and rename `temporary` to `out` once they are on the disk."""
    record = {
        "written_by": f"mlx_empire {__version__}",
        "layout": layout,
        "notes": list(notes),
        "files": sorted({RECORD_NAME} | _names(temporary)),
    }
    write_json(temporary / RECORD_NAME, record)
    sync_folder(temporary)
    refuse_foreign(out)
    _replace(temporary, out)


def remove(folder: Path) -> None:
    """Remove a folder, a file or a link, if there is one."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _replace(temporary: Path, out: Path) -> None:
    """Rename `temporary` to `out`; an earlier export steps aside first and is removed last."""
    earlier = out.parent / f".{out.name}.replaced"
    remove(earlier)
    if out.exists():
        os.rename(out, earlier)
    os.rename(temporary, out)
    sync_folder(out.parent)
    remove(earlier)


class disk_errors:
    """Turns an OSError into one line for the user that names the export folder; NoRoomError where the disk is full."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError):
            kind_of_error = NoRoomError if is_full(error) else UserError
            place = f" ({error.filename})" if error.filename else ""
            raise kind_of_error(f"{self._out}: cannot be written: {error.strerror or error}{place}") from None
