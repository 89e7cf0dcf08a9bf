"""Decides how a run writes on a disk: files that only their owner can read, and what is said of a disk that is full.

The one writer of such files: what a run writes, all of it goes through here. Decides that such a file has mode 0600
whatever the umask and whatever mode it had, that a symbolic link in its place is never followed, and what a crash
leaves: a file that is replaced is whole, the old one or the new one, at any moment; with `durable` also after a power
cut. All functions raise OSError.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO

_MODE = 0o600
WAIT_SECONDS = 0.2
_PIECE_BYTES = 1 << 24  # at a time


def create_private(path: Path) -> BinaryIO:
    """Create a file for writing that must not exist, not even as a link."""
    return os.fdopen(_open(path, os.O_WRONLY | os.O_EXCL), "wb")


def append_private(path: Path) -> FileIO:
    """Open a file to write at its end, made if need be; unbuffered: what `write` took survives our end."""
    return FileIO(_open(path, os.O_WRONLY | os.O_APPEND), "ab")


def open_private(path: Path) -> int:
    """A descriptor of a file for reading and writing, made if need be: what a lock is held on."""
    return _open(path, os.O_RDWR)


def unnamed_private(place: Path, nbytes: int) -> FileIO:
    """A file for reading and writing that has no name: it is gone when it is closed, whatever ends the process.

    It lies on the disk of a folder, which need not exist yet, and takes its room there now. Unbuffered; what is in it
    is not kept in memory where the system can be told so.
    """
    number, name = tempfile.mkstemp(prefix=".unnamed-", dir=_nearest(place))
    file = FileIO(number, "r+b")
    try:
        os.unlink(name)
        if hasattr(fcntl, "F_NOCACHE"):
            fcntl.fcntl(number, fcntl.F_NOCACHE, 1)
        _take_room(file, nbytes)
    except OSError:
        file.close()
        raise
    return file


def _take_room(file: FileIO, nbytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        if nbytes:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        return
    zeros = bytes(_PIECE_BYTES)
    while nbytes > 0:
        nbytes -= file.write(memoryview(zeros)[: min(nbytes, _PIECE_BYTES)])


def replace_private(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Put a file in its place at once, by a draft beside it. `durable`: it is on the disk when this returns.

    One process at a time may do so. A draft that an earlier one left is removed; after an error none is left.
    """
    draft = path.with_name(draft_of(path.name))
    draft.unlink(missing_ok=True)
    try:
        with create_private(draft) as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                sync_file(file)
        os.replace(draft, path)
    except OSError:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def draft_of(name: str) -> str:
    """The name of the draft by which the file `name` is replaced; a crash may leave it behind."""
    return f".{name}"


def sync_file(file: BinaryIO) -> None:
    """Make sure that a file's bytes are on the disk (macOS: F_FULLFSYNC; fsync leaves them in the drive).

    Disks on a network and some outer ones know no F_FULLFSYNC: there fsync is all that can be asked.
    """
    file.flush()
    if hasattr(fcntl, "F_FULLFSYNC"):
        with suppress(OSError):
            fcntl.fcntl(file.fileno(), fcntl.F_FULLFSYNC)
            return
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make sure that a folder's entries (created or renamed files) are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open(path: Path, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, _MODE)
    try:
        # The umask may have taken bits away; a file that was there may have had more.
        os.fchmod(descriptor, _MODE)
    except OSError:
        # Some network disks know no modes. A file that is new has none that others could use.
        if not flags & os.O_EXCL:
            os.close(descriptor)
            raise
    return descriptor


@contextmanager
def building(folder: Path, wait: Callable[[], object] = lambda: None) -> Iterator[Path]:
    """A private folder beside `folder` in which that is made, by one process at a time: whether another one has made it
    is known only here. At the end it is gone, or has become `folder`.

    `wait` is called several times a second while another process is at it. What kills left, here and beside, is
    removed first. OSError where nothing can be written there, or no lock can be held.
    """
    for parent in reversed([parent for parent in folder.parents if not parent.exists()]):
        parent.mkdir(mode=0o700, exist_ok=True)
    for left in folder.parent.glob(".building-*.lock"):
        _remove_dead(left)
    lock = folder.with_name(f".building-{folder.name}.lock")
    number = _held(lock, wait)
    place = lock.with_suffix(".d")
    try:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(mode=0o700)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        lock.unlink(missing_ok=True)
        os.close(number)


def put_folder(place: Path, folder: Path, is_whole: Callable[[], bool]) -> bool:
    """Whether `place` has become `folder`, also after a power cut: one that is there and whole stays, another goes."""
    try:
        place.rename(folder)
    except OSError:
        if is_whole():
            return False
        shutil.rmtree(folder, ignore_errors=True)
        place.rename(folder)
    sync_folder(folder.parent)
    return True


def _held(lock: Path, wait: Callable[[], object]) -> int:
    """A descriptor of the file `lock`, locked: nobody else has it, and the file is still there."""
    while True:
        number = open_private(lock)
        try:
            while not _locked(number):
                wait()
                time.sleep(WAIT_SECONDS)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(number), lock.stat()):
                    return number
        except BaseException:
            os.close(number)
            raise
        os.close(number)  # whoever had it has removed it


def _locked(number: int) -> bool:
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_dead(lock: Path) -> None:
    with suppress(OSError):  # held, or removed by another
        number = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
        try:
            if _locked(number) and os.path.samestat(os.fstat(number), lock.stat()):
                shutil.rmtree(lock.with_suffix(".d"), ignore_errors=True)
                lock.unlink(missing_ok=True)
        finally:
            os.close(number)


HEADROOM = 1.02  # rounding to the file system's blocks
SLACK_BYTES = 1 << 17  # folders, and what is small beside the weights


def with_headroom(nbytes: int) -> int:
    """The room that so many bytes of weights need, with what is written beside them."""
    return int(nbytes * HEADROOM) + SLACK_BYTES


def write_at(file: FileIO, data: memoryview, offset: int) -> None:
    """Write all bytes of `data` at `offset`; several threads may."""
    done = 0
    while done < len(data):
        done += os.pwrite(file.fileno(), data[done : done + _PIECE_BYTES], offset + done)


def read_at(file: FileIO, data: memoryview, offset: int) -> None:
    """Fill `data` from `offset` on; several threads may. OSError where the file ends before."""
    done = 0
    while done < len(data):
        count = os.preadv(file.fileno(), [data[done : done + _PIECE_BYTES]], offset + done)
        if not count:
            raise OSError(errno.EIO, "the file ends too early")
        done += count


def free_bytes(place: Path) -> int:
    """What is free on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(_nearest(place)).free


def disk_of(place: Path, host: str) -> str:
    """Identifies the file system of a folder, which need not exist yet, among those of all hosts."""
    return f"{host}:{_nearest(place).stat().st_dev}"


def mount_point(place: Path) -> Path:
    """Where the file system of a folder is mounted; no link is left in the path."""
    real = place.resolve()
    return next(path for path in (real, *real.parents) if path.is_mount())


def is_full(error: OSError) -> bool:
    """Whether a write failed because nothing more fits."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _nearest(place: Path) -> Path:
    absolute = place.absolute()
    return next(path for path in (absolute, *absolute.parents) if path.exists())
