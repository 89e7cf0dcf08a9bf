"""Decides how a run is asked to stop: SIGUSR1 (mpirun forwards it to every rank), SIGTERM, Ctrl-C, or a file named
`stop` in the run's folder.

A request only raises a flag. At a step's border all ranks compare their flags, so that they stop after the same
step, save there and leave with exit code 143. SIGTERM to a bare mpirun leaves ranks half a second, too little to
save; Ctrl-C to mpirun is the same. `mlx_empire.launch` turns both into SIGUSR1.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from mlx_empire.comm.protocol import Communicator
from mlx_empire.disk import append_private
from mlx_empire.errors import UserError

STOP_FILE = "stop"
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_CLOCK_SLACK_SECONDS = 1.0  # a file system's clock may run behind


class StopRequest:
    """Whether somebody asked this run to stop; use as a context manager in the main thread, as early as possible.

    Inside it the first signal is a request; the second one does what it does to any program. `watch` names the
    folder in which a file `stop` is a request too; one that is older than this object is left over from an earlier
    run and does not count.
    """

    def __init__(self) -> None:
        self._since = time.time()
        self._reason: str | None = None
        self._folder: Path | None = None
        self._before: dict[signal.Signals, Any] = {}

    def watch(self, folder: Path) -> None:
        """Look for the file `stop` in `folder` from now on; a stale one is removed."""
        self._folder = folder
        if not self._file_counts():
            (folder / STOP_FILE).unlink(missing_ok=True)

    @property
    def reason(self) -> str | None:
        """Why this rank was asked to stop, such as "SIGUSR1"; None where it was not."""
        if self._reason is None and self._file_counts():
            self._reason = f"the file {self._folder}/{STOP_FILE}"
        return self._reason

    def agreed(self, comm: Communicator) -> str | None:
        """Why the run stops now, the same on every rank, or None. Collective, for the border of a step.

        When it stops, the file `stop` has done its work and is removed.
        """
        reasons = comm.gather_json(self.reason)
        found = next(((rank, reason) for rank, reason in enumerate(reasons) if reason), None)
        if found is None:
            return None
        if self._folder is not None:
            (self._folder / STOP_FILE).unlink(missing_ok=True)
        rank, reason = found
        return reason if all(reasons) or comm.size == 1 else f"{reason} on {comm.hostnames[rank]}"

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._asked) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _asked(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._reason is None:
            self._reason = "Ctrl-C" if number == signal.SIGINT else name
            if number == signal.SIGINT:  # print would not be safe here, and nobody else answers the keyboard
                os.write(2, b"mlx_empire: stopping after this step; Ctrl-C again ends at once\n")
        elif number == signal.SIGINT:  # also where a shell had it ignored, as for jobs in the background
            self._restore()
            raise KeyboardInterrupt
        elif number != signal.SIGUSR1:  # twice forwarded is still one request
            self._restore()
            os.kill(os.getpid(), number)

    def _file_counts(self) -> bool:
        return self._folder is not None and stop_requested(self._folder, self._since)


def stop_requested(folder: Path, since: float) -> bool:
    """Whether the file `stop` in `folder` was made after `since` (seconds since 1970)."""
    try:
        return (folder / STOP_FILE).stat().st_mtime >= since - _CLOCK_SLACK_SECONDS
    except OSError:
        return False


def request_stop(folder: Path) -> None:
    """Ask the run in `folder` to stop, by its file `stop`."""
    try:
        append_private(folder / STOP_FILE).close()
        os.utime(folder / STOP_FILE)
    except OSError as error:
        raise UserError(f"{folder / STOP_FILE}: {error.strerror}; make it possible to write there") from None
