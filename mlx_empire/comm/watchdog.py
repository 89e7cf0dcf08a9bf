"""A thread beside the work on every rank that ends a run which does not go on, instead of letting it wait for ever.

What happens, again and again: look where the main thread is (`progress.places`), tell all other ranks, hear where they
are, and judge (`deadlines`). When a rank is lost, whoever finds it tells all others; every rank that can prints the
stacks of its threads; then one of them says who was lost and why, and all end with exit code 75. A thread can do that
while the main one is stuck in `mx.eval` or in MPI; a signal handler could not.

The process may itself have been stopped (SIGSTOP, a machine asleep). Then all others seem silent: the time that this
thread did not run is not held against anyone.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from mlx_empire import progress
from mlx_empire.comm import liveness
from mlx_empire.comm.deadlines import Deadlines, PeerStatus, Status, late, lost_ranks
from mlx_empire.comm.failure import end
from mlx_empire.comm.protocol import Communicator
from mlx_empire.errors import LostRankError

TICK_SECONDS = 0.25
STACKS_SECONDS = 1.5  # in which all ranks print their stacks before the run is ended
SPEAKER_SECONDS = 10.0  # after which a rank ends the run though another one should have
CLOSING_SECONDS = 5.0
PAUSE_SECONDS = 0.5  # a later tick than that was a pause of this process
LONG = ("save", "retention")  # phases of another thread that a step may have to wait for


class Watchdog:
    """Watches from `with` to its end; made in the thread that is to be watched, on all ranks. Collective.

    ceiling, floor: seconds, see `deadlines.Deadlines`.
    """

    def __init__(self, comm: Communicator, ceiling: float, floor: float) -> None:
        self._comm, self._heartbeat = comm, comm.heartbeat()
        self._deadlines = Deadlines(ceiling, min(floor, ceiling))
        self._main = threading.current_thread().name
        self._closing = threading.Event()
        self._heard: list[tuple[float, Status]] = []  # by rank: when, and what
        self._gone: set[int] = set()
        self._told: dict[int, str] = {}
        self._since = 0.0
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._since = time.monotonic()
        first = Status(deadline=self._deadlines.ceiling)
        self._heard = [(self._since, first)] * self._comm.size
        liveness.watch(True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join(CLOSING_SECONDS)
        liveness.watch(False)

    def _run(self) -> None:
        last, paused = time.monotonic(), 0.0
        while not self._closing.wait(TICK_SECONDS):
            now = time.monotonic()
            missed, last = now - last - TICK_SECONDS, now
            for rank, message in self._heartbeat.receive():
                if "lost" in message:
                    self._end({int(r): why for r, why in message["lost"].items()})
                elif "bye" in message:
                    self._gone.add(rank)
                else:
                    self._heard[rank] = (now, Status(**message))
            if (
                paused > self._heard[self._comm.rank][1].deadline / 4
            ):  # not at once: it may have been meant to end
                self._say(f"{self._name(self._comm.rank)} did not run for {paused:.3g} s and goes on")
            paused = missed if missed > PAUSE_SECONDS else 0.0
            # Forgive everyone the time that this thread did not run.
            self._heard = [(min(now, heard + paused), status) for heard, status in self._heard]
            self._since = now if paused else self._since
            own = self._own_status(now)
            self._deadlines.observe(own)
            self._heard[self._comm.rank] = (now, own)
            self._heartbeat.send(vars(own))
            peers = [PeerStatus(s, now - t, r in self._gone) for r, (t, s) in enumerate(self._heard)]
            if lost := lost_ranks(peers):
                self._heartbeat.send({"lost": lost}, last=True)
                self._end(lost)
            self._name_late(late(peers))
        self._heartbeat.send({"bye": True}, last=True)

    def _own_status(self, now: float) -> Status:
        places = progress.places()
        place = places.get(self._main) or progress.Place("start", 0, self._since)
        waits = liveness.waits(self._main)
        others = [p for thread, p in places.items() if thread != self._main and p.phase.startswith(LONG)]
        moved = max(liveness.last_moved(), self._since, *(p.since for p in (place, *others)))
        deadline = max(self._deadlines.of(p.phase) for p in (place, *others))
        return Status(place.phase, place.step, max(0.0, now - moved), waits, deadline)

    def _name_late(self, found: Mapping[int, str]) -> None:
        """Say once who is late, on the lowest rank that is not."""
        on_time = [rank for rank in range(self._comm.size) if rank not in found]
        for rank, what in found.items():
            if self._told.get(rank) != what and (not on_time or self._comm.rank == on_time[0]):
                self._say(f"{self._name(rank)} {what}")
        self._told = dict(found)

    def _end(self, lost: Mapping[int, str]) -> None:
        """Print stacks, let everyone do so, and end all ranks."""
        sys.stderr.write(f"\n---- stacks of {self._name(self._comm.rank)}\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        able = [rank for rank in range(self._comm.size) if rank not in lost]
        speaks = self._comm.rank == (able or sorted(lost))[0]
        time.sleep(STACKS_SECONDS if speaks else SPEAKER_SECONDS)
        said = "; ".join(f"{self._name(rank)}: {why}" for rank, why in lost.items())
        message = f"mlx_empire: {said}; the run is ended, start it again"
        end(self._comm, message, LostRankError.exit_code, said, min(lost))

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._comm.hostnames[rank]}"

    def _say(self, text: str) -> None:
        print(f"mlx_empire: {text}", file=sys.stderr, flush=True)
