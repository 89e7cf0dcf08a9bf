"""How a result folder comes to its place: written beside it in a hidden folder, recorded, and renamed at the end.

Decides whose folders may be replaced (ours, by their record) and that an interrupted export never looks like a
finished one. Folders get mode 0700 whatever the umask.

Decides also which files besides the weights it gets: an allow-list of names, plain files only. Nothing that is or
carries code (`*.py`, pickles) is on the list. A symbolic link is followed only where Hugging Face's own cache has
one: from a snapshot to a blob of the same repository.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from mlx_empire import __version__
from mlx_empire.disk import create_private, free_bytes, is_full, sync_file, sync_folder
from mlx_empire.errors import NoRoomError, UserError
from mlx_empire.formats.safetensors import open_plain
from mlx_empire.model.config import DTYPE_KEYS, tagged
from mlx_empire.model.quantize import unpacked
from mlx_empire.sizes import amount

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "qwen.tiktoken",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
)
NAMED_TEMPLATES = (
    "additional_chat_templates"  # a folder of NAME.jinja, which transformers reads beside the default
)
CODE = ("*.py", "*.bin", "*.pt", "*.pth", "*.pkl")
OPTIONAL = (
    "LICENSE",
    "NOTICE",
    "preprocessor",
    "processor",
    "video_preprocessor",
)  # a text model opens without


def copy_side_files(source: Path, target: Path) -> tuple[list[str], list[str]]:
    """Copy the allowed files that are there; returns their names, and a note for each thing left behind."""
    copied, notes = [], []
    for file in side_files(source):
        if not _is_plain(file, source):
            notes.append(f"{file} was not copied: it is not a plain file of this folder")
            continue
        name = file.relative_to(source)
        (target / name).parent.mkdir(mode=0o700, exist_ok=True)
        with open_plain(file) as reader, create_private(target / name) as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
            sync_file(writer)
        copied.append(str(name))
    if (target / NAMED_TEMPLATES).is_dir():
        sync_folder(target / NAMED_TEMPLATES)
    code = sorted(f.name for pattern in CODE for f in source.glob(pattern))
    if code:
        notes.append(f"code and pickles of {source} were not copied: {', '.join(code[:5])}")
    return copied, notes


def side_files(source: Path) -> list[Path]:
    """What lies in the folder under an allowed name, plain or not; named templates only in a folder of its own."""
    templates = source / NAMED_TEMPLATES
    named = [] if templates.is_symlink() else sorted(templates.glob("*.jinja"))
    return [
        file
        for file in [*(source / name for name in SIDE_FILES), *named]
        if file.exists() or file.is_symlink()
    ]


def refuse_uncopied(source: Path) -> None:
    """UserError where a file of the tokenizer could not be carried into a result, which would then not open."""
    templates = source / NAMED_TEMPLATES
    if templates.is_symlink():
        raise UserError(f"{templates}: a link, which results do not follow; put the folder itself there")
    for file in side_files(source):
        if not file.name.startswith(OPTIONAL) and not _is_plain(file, source):
            raise UserError(
                f"{file}: not a plain file of this folder, so the result would lack it; put a copy of it there"
            )
        if _is_plain(file, source) and not os.access(file, os.R_OK):
            raise UserError(
                f"{file}: cannot be read, and the result gets a copy of it; give yourself the right to"
            )


def stored_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The original configuration with the dtype that is now stored, also in its language model's part, unpacked."""
    result = unpacked(config)
    text = result.get("text_config")
    if isinstance(text, Mapping):
        result["text_config"] = {key: dtype if key in DTYPE_KEYS else value for key, value in text.items()}
    result.update(dict.fromkeys([key for key in DTYPE_KEYS if key in result] or ["torch_dtype"], dtype))
    found: dict[str, Any] = tagged(result)
    return found


def write_json(path: Path, value: Any) -> None:
    """Write a new JSON file (mode 0600, fsynced)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a new text file (mode 0600, fsynced)."""
    with create_private(path) as file:
        file.write(text.encode("utf-8", "surrogatepass"))
        sync_file(file)


def _is_plain(file: Path, source: Path) -> bool:
    if file.is_symlink():
        blobs = source.parent.parent / "blobs"
        resolved = file.resolve()
        inside = source.parent.name == "snapshots" and resolved.parent == blobs.resolve()
        return inside and resolved.is_file()
    return stat.S_ISREG(file.lstat().st_mode)


RECORD_NAME = "EXPORT.json"  # says that a folder is ours: which files were written, in which layout


def refuse_foreign(out: Path) -> None:
    """UserError unless `out` is absent, an empty folder, or holds only an earlier export of ours."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out}: exists and is not a folder; move it away or choose another place")
    names = _names(out) if out.exists() else set()
    if not names:
        return
    record = export_record(out)
    try:
        ours = str(record["written_by"]).startswith("mlx_empire") and names <= set(record["files"])
    except (KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(
            f"{out}: exists and holds files that mlx_empire did not write; move them or export elsewhere"
        )


def export_record(folder: Path) -> dict[str, Any]:
    """What stands in a folder's EXPORT.json; nothing without one that can be read."""
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _names(folder: Path) -> set[str]:
    """Of all that lies in a folder, also in the folders in it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def require_room(out: Path, needed: int) -> None:
    """NoRoomError unless so many bytes are free where `out` is to be written."""
    free = free_bytes(out.parent)
    if free < needed:
        raise NoRoomError(f"{out}: needs {amount(needed)}, {amount(free)} are free on its disk", needed)


def fresh_folder(folder: Path) -> None:
    """Make an empty private folder; what an interrupted export left there goes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove(folder)
    folder.mkdir(mode=0o700)
    folder.chmod(0o700)


def publish(
    temporary: Path,
    out: Path,
    layout: str,
    notes: Sequence[str],
    about: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Record which files were written, and what is to be said `about` them, and rename `temporary` to `out` once they
    are on the disk.
    """
    record = {
        "written_by": f"mlx_empire {__version__}",
        "layout": layout,
        "notes": list(notes),
        "files": sorted({RECORD_NAME} | _names(temporary)),
        **about,
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
