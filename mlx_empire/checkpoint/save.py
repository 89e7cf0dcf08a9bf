"""Saving beside the training: a thread writes the live arrays while the next step computes.

There is no room for a copy of a shard, so the thread reads the very arrays that the next update replaces. `hold(u)`,
which the store calls before unit u is updated, waits until its bytes are written; a step lasts about as long as the
longer of its computation and the write. The thread has a communicator of its own and runs the protocol of `commit`;
what it has to say is fetched by `news` at a step's border. A save that fails for lack of disk is told and counted, and
training goes on; any other error of the thread is raised in the main thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from mlx_empire import progress
from mlx_empire.checkpoint.agree import Folders, SaveFailed, find_folders
from mlx_empire.checkpoint.commit import Commit, Describe
from mlx_empire.checkpoint.manifest import Identity
from mlx_empire.checkpoint.paths import step_name
from mlx_empire.checkpoint.retention import clear_the_way, give_up, retain
from mlx_empire.checkpoint.shard import LivePiece, live_pieces
from mlx_empire.comm.failure import AgreedExit
from mlx_empire.comm.protocol import Communicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine.store import ShardStore
from mlx_empire.errors import EmpireError
from mlx_empire.sizes import amount

NOBODY_WAITS_SECONDS = 86400.0  # a slow disk is no lost rank: hangs are the watchdog's business


@dataclass(frozen=True)
class Policy:
    """How many checkpoints to keep (None: all), and whether other nodes keep copies of shards."""

    keep_last: int | None
    copies: bool | Literal["auto"]


class Saver:
    """Saves the shards of `store`; constructed by all ranks together. Use it as a context manager.

    `root` is this rank's folder, which is not touched before `open` or the first save. `identity` makes
    the manifests; `newest` is the step from which the run goes on, 0 for none. `order`: that in which units are updated
    (None: as they stand).
    """

    def __init__(
        self,
        comm: Communicator,
        store: ShardStore,
        root: Path,
        identity: Identity,
        policy: Policy,
        newest: int = 0,
        order: Sequence[int] | None = None,
    ) -> None:
        self._main, self._comm = comm, comm.duplicate(NOBODY_WAITS_SECONDS)
        self._store, self._root = store, root
        store.hold = self.hold
        self._folders: Folders | None = None
        self._identity, self._policy = identity, policy
        self._order = list(order if order is not None else range(len(store.plan.units)))
        self.newest = newest  # the step of the newest committed checkpoint
        self.failed: list[int] = []  # steps whose save failed
        self._asked = newest
        self._news: deque[str] = deque()
        self._changed = threading.Condition()
        self._waiting: set[int] = set()  # units that are not written yet
        self._bytes = (0, 0)  # written, in all
        self._broken: BaseException | None = None  # what ended the thread
        self._held_up = 0.0
        self._future: Future[None] | None = None
        self._thread = CommThread("checkpoint")

    # ---- for the main thread

    def open(self) -> None:
        """Make the folder and clear it of what interrupted saves left. Collective; UserError agreed on."""
        if self._folders is None:
            self._folders = find_folders(self._main, self._root)
            self._news += clear_the_way(self._main, self._folders, self.newest)
            if self._policy.copies is True and len(set(self._folders.leaders)) == 1:
                self._news.append("run.buddy: there is one checkpoint folder only, so there are no copies")

    def request(self, step: int, numerics: Mapping[str, Sequence[float]]) -> None:
        """Begin to save the state after `step`; waits until an earlier save has ended. All ranks, same steps.

        `numerics`: what the watch over leaps has seen.
        """
        if step == self._asked:
            return
        self.finish()
        self.open()
        pieces = live_pieces(self._store, self._comm.rank, self._order)
        self._asked, self._bytes = step, (0, sum(piece.nbytes for piece in pieces))
        self._waiting = {piece.unit for piece in pieces}
        describe = partial(self._identity.manifest, step, numerics)
        self._future = self._thread.submit(self._save, step, pieces, describe, name=("save", step))

    def hold(self, unit: int) -> None:
        """Return when the arrays of `unit` may be replaced; raises what the thread raised."""
        if unit in self._waiting:
            progress.reach("save-wait")
            start = time.perf_counter()
            with self._changed:
                self._changed.wait_for(lambda: unit not in self._waiting)
            self._held_up += time.perf_counter() - start
            progress.reach("optimizer")
        if self._broken is not None:
            raise self._broken

    def held_up(self) -> float:
        """Seconds that `hold` has made the main thread wait since this was asked last."""
        seconds, self._held_up = self._held_up, 0.0
        return seconds

    def observe(self, observer: Callable[[tuple[str, int], float, float], None] | None) -> None:
        """Have `observer` told of every save, with its beginning and end by `time.perf_counter`."""
        self._thread.observe = observer

    def finish(self) -> None:
        """Wait until nothing is being saved; raises what the thread raised."""
        if self._future is not None:
            if not self._future.done():
                progress.reach("save-wait")
            self._future.result()
            self._future = None

    def news(self) -> list[str]:
        """What there is to tell since the last call; raises what the thread raised."""
        if self._future is not None and self._future.done():
            self._future.result()
        return [self._news.popleft() for _ in range(len(self._news))]

    @property
    def status(self) -> str | None:
        """How far the running save is, for a display; None where none runs."""
        if self._future is None or self._future.done():
            return None
        written, total = self._bytes
        return (
            f"saving {step_name(self._asked)}  {written / max(total, 1):.0%} of this rank's {amount(total)}"
        )

    def give_up_for(self, disk: str, nbytes: int) -> list[str]:
        """Older copies and checkpoints go, if that makes so many bytes free on `disk`; a line for each.

        Collective, while nothing is being saved. The newest checkpoint stays, and those that are pinned.
        """
        if self._folders is None or disk not in self._folders.disks:
            return []
        try:
            _, given_up = give_up(self._main, self._folders, {disk: nbytes}, self.newest)
        except SaveFailed:
            return []
        return given_up

    def unsaved(self) -> list[str]:
        """What is to be said at the end of a run about checkpoints that could not be saved."""
        if not self.failed:
            return []
        steps = ", ".join(map(str, self.failed))
        newest = f"the newest is that of step {self.newest}" if self.newest else "there is none"
        return [f"WARNING: the checkpoints of step {steps} could not be saved; {newest}"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, AgreedExit) or (isinstance(error, EmpireError) and error.shared):
            with suppress(BaseException):  # all ranks leave together: what was begun before the error is good
                self.finish()
        self._thread.close(60.0 if error is None else 0.0)

    # ---- on the thread

    def _save(self, step: int, pieces: list[LivePiece], describe: Describe) -> None:
        assert self._folders is not None
        commit = Commit(self._comm, self._folders, step, describe, self._policy.copies, self.newest)
        name, start = step_name(step), time.monotonic()
        try:
            shards = commit.run(pieces, self._pass)
            self.newest = step
            self.failed = [other for other in self.failed if other != step]
            total = sum(shard.nbytes for shard in shards)
            seconds = time.monotonic() - start
            said = f"{name} saved: {amount(total)} in {seconds:.1f} s"
            self._news.append(said + _after(commit.notes) if commit.notes else progress.Passing(said))
            self._retain(step)
        except SaveFailed as error:
            self.failed = sorted({*self.failed, step})
            self._asked = self.newest  # it may be asked for again
            newest = f"the newest is {step_name(self.newest)}" if self.newest else "there is none yet"
            problem = f"{name} could not be saved, training goes on; {newest}: {error}"
            self._news.append(f"WARNING: {problem}{_after(commit.notes)}")
            if self._main.rank == 0:
                progress.tell_notice("disk", str(problem))
        except BaseException as error:
            self._broken = error
            raise
        finally:
            for piece in pieces:
                piece.views = []
            with self._changed:
                self._waiting.clear()
                self._changed.notify_all()
            progress.leave()

    def _retain(self, step: int) -> None:
        try:
            assert self._folders is not None
            retain(self._comm, self._folders, step, self._policy.keep_last)
        except SaveFailed as error:
            self._news.append(f"WARNING: old checkpoints could not be removed: {error}")

    def _pass(self, unit: int, nbytes: int) -> None:
        """All of `unit` is written."""
        with self._changed:
            self._waiting.discard(unit)
            self._bytes = (max(nbytes, self._bytes[0]), self._bytes[1])
            self._changed.notify_all()


def _after(notes: list[str]) -> str:
    return f" ({'; '.join(notes)})" if notes else ""
