"""One run per folder: a second launch into the same `run.dir` is refused with the name of the one that is there.

A lock is a file (mode 0600) that its holder has locked by `flock` while it lives, so the system itself lets go of it
when the process ends, however it ends. The file says who holds it. On a shared disk another machine may not see the
`flock`: there a holder elsewhere counts as alive while it touches the file, which it does every few seconds. A lock
whose holder is gone is taken over, and said so; so is one that came along with a copy of a folder, whose holder, alive
or not, holds another file.

A folder has two such files, because two processes of one run hold it at the same time: `LOCK` is rank 0's (or that of
the command that starts daughters), `launch.lock` the launcher's. The launcher holds its own from the first launch to
the last, over all restarts. Rank 0 is not its child: mpirun, and maybe ssh, stand between them and hand on no open
file. So it takes `LOCK` itself, which also keeps away a run that is started without a launcher.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from mlx_empire.disk import open_private
from mlx_empire.errors import UserError

LockName = Literal["LOCK", "launch.lock"]
RUN: LockName = "LOCK"
LAUNCHER: LockName = "launch.lock"
TOUCH_SECONDS = 15.0
STALE_SECONDS = 120.0  # a holder elsewhere that has not touched its file for so long is gone
MAX_BYTES = 4096
_TRIES, _PAUSE_SECONDS = 5, 0.02  # `is_held` holds a lock for an instant
_REMEDIES = {
    RUN: "wait for it, end it",
    LAUNCHER: "look at it with `mlx-empire status {folder}`",
}


@dataclass(frozen=True)
class Holder:
    """Who holds a lock: machine, process and since when (local time, ISO 8601), and the locked file's inode number.

    A copy of the file has another number, on every machine that sees it. `file` is None where it was not noted.
    """

    host: str
    pid: int
    since: str
    file: int | None = None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def read_holder(folder: Path, name: LockName = RUN) -> Holder | None:
    """Who wrote a lock file of a run's folder; None where there is none that can be read."""
    try:
        with (folder / name).open("rb") as file:
            raw = json.loads(file.read(MAX_BYTES))
        number = raw.get("file")
        return Holder(
            str(raw["host"])[:255],
            int(raw["pid"]),
            str(raw["since"])[:40],
            number if isinstance(number, int) else None,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def is_held(folder: Path, name: LockName) -> bool:
    """Whether a process of this machine holds the lock, of any version of this program."""
    try:
        file = os.open(folder / name, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False


def in_use(folder: Path, name: LockName, seen: str = "") -> UserError:
    """What is raised where a lock is held: it names the holder. `seen`: how it is known to live."""
    holder = read_holder(folder, name) or "another process"
    remedy = _REMEDIES[name].format(folder=folder)
    return UserError(f"run.dir: {folder}: is in use by {holder}{seen}; {remedy}, or choose another run.dir")


class RunLock:
    """A held lock of a run's folder; a context manager. `note` is what there is to say about a stale one."""

    def __init__(self, folder: Path, name: LockName = RUN, *, stale_seconds: float = STALE_SECONDS) -> None:
        """Make the folder (mode 0700) if need be and take its lock. UserError naming the holder if it is held."""
        self.note: str | None = None
        self._folder, self._name = folder, name
        try:
            self._made = _make(folder)
            self._file = self._take(stale_seconds)
        except OSError as error:
            raise UserError(
                f"run.dir: {folder}: {error.strerror}; choose a folder that can be written"
            ) from None
        self._released = threading.Event()
        threading.Thread(target=self._keep_touching, name="run lock", daemon=True).start()

    @property
    def file(self) -> int:
        """The locked file's descriptor: a process that inherits it holds the lock for as long as it lives."""
        return self._file

    def release(self) -> None:
        """Let go; a folder that was made for the lock and got nothing else goes too."""
        if self._released.is_set():
            return
        self._released.set()
        with suppress(OSError):
            if self._name == RUN:
                (self._folder / RUN).unlink()
            else:  # launchers of earlier versions do not see that a file which they are about to lock was removed
                os.ftruncate(self._file, 0)
        os.close(self._file)
        with suppress(OSError):
            for folder in self._made:
                folder.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _take(self, stale_seconds: float) -> int:
        """The locked file's descriptor, with this process written into it."""
        path = self._folder / self._name
        while True:
            file = open_private(path)
            try:
                if not _lock(file):
                    raise in_use(self._folder, self._name)
                holder, number = read_holder(self._folder, self._name), os.fstat(file).st_ino
                copied = holder is not None and holder.file not in (None, number)
                if holder is not None and not copied and holder.host != socket.gethostname():
                    quiet = _age(path)
                    if quiet < stale_seconds:
                        seen = f" (its file was touched {quiet:.0f} s ago)"
                        raise in_use(self._folder, self._name, seen)
                if not _same(file, path):  # its holder removed it between our opening and our locking it
                    os.close(file)
                    continue
                if os.fstat(file).st_size:
                    self.note = f"took over the lock of {self._folder} {_left(holder, copied)}"
                since = datetime.now().astimezone().isoformat(timespec="seconds")
                own = json.dumps(asdict(Holder(socket.gethostname(), os.getpid(), since, number)))
                os.ftruncate(file, 0)
                os.pwrite(file, own.encode() + b"\n", 0)
                return file
            except BaseException:
                with suppress(OSError):
                    os.close(file)
                raise

    def _keep_touching(self) -> None:
        while not self._released.wait(TOUCH_SECONDS):
            with suppress(OSError):
                os.utime(self._folder / self._name)


def _lock(file: int) -> bool:
    """Lock an open file if nobody has, or only looks at it."""
    for _ in range(_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PAUSE_SECONDS)
        else:
            return True
    return False


def _left(holder: Holder | None, copied: bool) -> str:
    """What was known of a lock that nobody holds."""
    if holder is None:
        return "that nobody can be read from"
    return f"that was copied from where {holder}, held it" if copied else f"left by {holder}, which is gone"


def _make(folder: Path) -> list[Path]:
    """Make a private folder and the parents it lacks; returns those that were made, innermost first."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(absent):
        path.mkdir(mode=0o700, exist_ok=True)
    return absent


def _same(file: int, path: Path) -> bool:
    """Whether the open file is the one that has the name now."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _age(path: Path) -> float:
    """Seconds since a file was touched, by the clock of the disk it lies on: the two machines' may differ."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".clock-") as now:
        return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime
