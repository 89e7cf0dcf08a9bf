"""A run that is looked at again and again: what is new in its folder is read, and what was read before is kept.

Everything that one machine's pages show goes through one `Gallery`: a run's files are read once for all readers, and
what a page says of a look is made once (`Look.once`). A reader's own is what was sent to it, and sending that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mlx_empire.errors import UserError
from mlx_empire.evaluation.reading import FILE_NAME as SAMPLES
from mlx_empire.page.series import Series
from mlx_empire.report.metrics import FILE_NAME as METRICS
from mlx_empire.report.metrics import MetricsCursor
from mlx_empire.run.launched import COMPLETE, LOG, STATE
from mlx_empire.run.names import PLAN, RECIPE
from mlx_empire.run.overview import Overview, RecipeFile, held_on_disk, read_folder, runs_in

SIZE_SECONDS = 60.0  # so long a folder's size counts as known: all its files are asked
FOLDERS_SECONDS = 5.0  # so long the list of runs does
LOOK_SECONDS = 5.0  # so long a run does whose files do not change
T = TypeVar("T")
FILES = (METRICS, SAMPLES, RECIPE, PLAN, STATE, LOG, COMPLETE, "checkpoints")


@dataclass(frozen=True)
class Look:
    """A run at one moment. `round`: grows whenever steps that were read before count no more.

    The series goes on growing while others look: hold `lock` while it is read, or let `once` do it.
    """

    name: str
    overview: Overview
    series: Series
    round: int
    lock: threading.RLock
    _made: dict[object, Any] = field(default_factory=dict, repr=False)

    def once(self, make: Callable[[Look], T]) -> T:
        """What `make` makes of this look: made by the first who asks, with the lock held."""
        with self.lock:
            if make not in self._made:
                self._made[make] = make(self)
            found: T = self._made[make]
            return found


@contextmanager
def held_still(looks: Iterable[Look]) -> Iterator[None]:
    """Hold the locks of several looks; all take them in one order, so that no two wait for each other."""
    with ExitStack() as held:
        for look in sorted(looks, key=lambda look: look.name):
            held.enter_context(look.lock)
        yield


class WatchedRun:
    """One run's folder. `name`: what it is called on the page."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self.lock = folder, name, threading.RLock()
        self._cursor, self._series, self._round = MetricsCursor(folder), Series(), 0
        self._recipe = RecipeFile(folder)
        self._size, self._sized = 0, -SIZE_SECONDS
        self._seen: tuple[float, object] = (-LOOK_SECONDS, None)
        self._found: Look | None = None

    def look(self) -> Look | None:
        """What the folder says now; None where no run is any more. UserError where launch.json is damaged.

        The same object as before while no file has changed, for some seconds: then it is asked whether it still runs.
        """
        with self.lock:
            stamp = [_stamp(self.folder / name) for name in FILES]
            then, seen = self._seen
            if stamp == seen and time.monotonic() - then < LOOK_SECONDS:
                return self._found
            asked = time.monotonic()
            anew, more = self._cursor.follow()
            if anew:
                self._series, self._round = Series(), self._round + 1
            for record in more:
                self._series.add(record)
            records = [*self._series.evaluations, *self._series.recent]
            overview = read_folder(self.folder, records, self._recipe)
            self._seen = asked, stamp  # only now: what could not be read is told to everybody who asks
            self._found = (
                None if overview is None else Look(self.name, overview, self._series, self._round, self.lock)
            )
            return self._found

    def size(self) -> int:
        """Bytes on the disk, as of at most a minute ago."""
        if time.monotonic() - self._sized > SIZE_SECONDS:
            self._size, self._sized = held_on_disk(self.folder), time.monotonic()
        return self._size


def full_path(folder: Path) -> Path:
    """The folder from the root of the file system on, so that it has a name and a parent: also `.` and `..`."""
    return folder.resolve() if ".." in folder.parts else folder.absolute()


def name_in(root: Path, run: Path) -> str:
    """What a run is called on the pages of `root`."""
    return root.name if run == root else run.relative_to(root).as_posix()


class Gallery:
    """The runs in a folder, by their path from there; the folder itself is a run called by its own name."""

    def __init__(self, root: Path) -> None:
        self.root = full_path(root)
        self._runs: dict[Path, WatchedRun] = {}
        self._listed: tuple[float, list[Path]] = (-FOLDERS_SECONDS, [])
        self._lock = threading.Lock()

    def run(self, name: str) -> WatchedRun | None:
        """The run of that name; None where there is none. No name leads out of the folder."""
        found = next((run for run in self.runs() if run.name == name), None)
        if found is None:  # it may be one that has just begun
            self._listed = (-FOLDERS_SECONDS, [])
            found = next((run for run in self.runs() if run.name == name), None)
        return found

    def runs(self) -> list[WatchedRun]:
        """All runs, by name."""
        with self._lock:
            then, folders = self._listed
            if time.monotonic() - then > FOLDERS_SECONDS:
                folders = runs_in(self.root)
                self._listed = (time.monotonic(), folders)
                self._runs = {path: self._runs.get(path) or self._watched(path) for path in folders}
            return [self._runs[path] for path in folders]

    def looks(self) -> Iterator[tuple[WatchedRun, Look]]:
        """Each run that can be read, and what it says now."""
        for run in self.runs():
            try:
                found = run.look()
            except (UserError, OSError):  # its own page says what is wrong
                continue
            if found is not None:
                yield run, found

    def _watched(self, path: Path) -> WatchedRun:
        return WatchedRun(path, name_in(self.root, path))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
