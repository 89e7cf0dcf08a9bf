"""Which names a checkpoint folder may hold, and that nothing else in it is ever touched.

    checkpoints/
      step-000003/            one checkpoint: this node's shards, and copies of another node's
        shard-00000-of-00002.safetensors
        MANIFEST.json         the same on every node
        COMMIT                the manifest's digest; without it (on all nodes) the checkpoint does not count
        KEEP                  made by a person: retention leaves this checkpoint alone
      .tmp-6-1a2b3c4d/        a checkpoint being written
      superseded-000009-../   set aside, because the run went on from an earlier one; goes first where room is short
      LATEST                  a hint for people

Folders have mode 0700, files 0600, whatever the umask. Symbolic links are never followed.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Container
from pathlib import Path
from typing import BinaryIO

from mlx_empire.errors import UserError

MANIFEST, COMMIT, PIN, LATEST = "MANIFEST.json", "COMMIT", "KEEP", "LATEST"
SHARD_PATTERN = r"^shard-[0-9]{5}-of-[0-9]{5}\.safetensors$"
_STEP = re.compile(r"step-([0-9]{6,12})")
_ASIDE = re.compile(r"superseded-([0-9]{6,12})-[0-9a-f]{8}")
_DRAFT = re.compile(r"\.tmp-[0-9]{1,12}-[0-9a-f]{8}")
_OURS = re.compile(rf"{SHARD_PATTERN[1:-1]}|MANIFEST\.json|COMMIT|\.COMMIT")


def step_name(step: int) -> str:
    """The folder of a checkpoint."""
    return f"step-{step:06d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder name; None for any other name."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found and step_name(int(found[1])) == name else None


def draft_name(step: int, attempt: str) -> str:
    """The folder of a checkpoint that is being written."""
    return f".tmp-{step}-{attempt}"


def shard_name(rank: int, size: int) -> str:
    """The file of one rank's shard."""
    return f"shard-{rank:05d}-of-{size:05d}.safetensors"


def steps_in(root: Path) -> dict[int, Path]:
    """The checkpoint folders in `root` by step, ascending; real folders only."""
    found = {step: path for path in _entries(root) if (step := step_of(path.name)) is not None}
    return {step: found[step] for step in sorted(found) if is_folder(found[step])}


def set_aside_in(root: Path) -> dict[int, list[Path]]:
    """The checkpoints in `root` that were set aside, by step, ascending; real folders only."""
    found: dict[int, list[Path]] = {}
    for path in sorted(_entries(root)):
        if (name := _ASIDE.fullmatch(path.name)) is not None and is_folder(path):
            found.setdefault(int(name[1]), []).append(path)
    return dict(sorted(found.items()))


def links_in(root: Path) -> dict[int, Path]:
    """The symbolic links in `root` that are named as checkpoints, by step."""
    found = {step: path for path in _entries(root) if (step := step_of(path.name)) is not None}
    return {step: path for step, path in found.items() if path.is_symlink()}


def broken_link(path: Path) -> Path | None:
    """The link on the way to `path` that leads nowhere (its disk may be unplugged); None where there is none."""
    for one in (path, *path.parents):
        if os.path.exists(one):
            return None
        if os.path.islink(one):
            return one
    return None


def refuse_broken_link(key: str, folder: Path) -> None:
    """UserError where the folder that the recipe's `key` names is behind a link that leads nowhere."""
    link = broken_link(folder)
    if link is not None:
        raise UserError(
            f"{key}: {folder}: {link} is a link to {link.readlink()}, which is not there; bring it back "
            "(is its disk mounted?), or remove the link"
        )


def drafts_in(root: Path) -> list[Path]:
    """What interrupted saves left in `root`."""
    return sorted(path for path in _entries(root) if _DRAFT.fullmatch(path.name) and is_folder(path))


def is_folder(path: Path) -> bool:
    """True for a folder, not for a link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def make_private(folder: Path) -> None:
    """Make a folder that must not exist, and its parents."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700)
    folder.chmod(0o700)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint or draft: its own files, COMMIT first, then the folder, which stays if others are in it."""
    if not is_folder(folder):
        return
    for path in sorted(_own_files(folder), key=lambda path: path.name != COMMIT):
        path.unlink()
    folder.rmdir()


def remove_own(folder: Path, names: Container[str]) -> None:
    """Remove files of a checkpoint, of those that are its own."""
    for path in _own_files(folder):
        if path.name in names:
            path.unlink()


def held_bytes(folder: Path) -> dict[str, int]:
    """The bytes on the disk of a checkpoint's own files, by name: what removing them would free."""
    return {path.name: path.lstat().st_blocks * 512 for path in _own_files(folder)}


def _own_files(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if _OURS.fullmatch(path.name)]


def open_own(path: Path) -> BinaryIO:
    """Open a regular file for reading; OSError for a link."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(0, "not a regular file", str(path))
    return file


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
