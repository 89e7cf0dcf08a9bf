"""What a disk has room for, which folders share one, and how its being full is told from every other error."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

HEADROOM = 1.02  # rounding to the file system's blocks
SLACK_BYTES = 1 << 17  # folders, and what is small beside the weights


def with_headroom(nbytes: int) -> int:
    """The room that so many bytes of weights need, with what is written beside them."""
    return int(nbytes * HEADROOM) + SLACK_BYTES


def free_bytes(place: Path) -> int:
    """What is free on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(_nearest(place)).free


def disk_of(place: Path, host: str) -> str:
    """Identifies the file system of a folder, which need not exist yet, among those of all hosts."""
    return f"{host}:{_nearest(place).stat().st_dev}"


def is_full(error: OSError) -> bool:
    """Whether a write failed because nothing more fits."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _nearest(place: Path) -> Path:
    absolute = place.absolute()
    return next(path for path in (absolute, *absolute.parents) if path.exists())
