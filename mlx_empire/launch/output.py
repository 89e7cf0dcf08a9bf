"""Passes a command's output on, byte by byte, and lets us read it too.

Open MPI announces the loss of a machine on standard output, so that has to be read. Yet the ranks look at mpirun's
output to see whether a person watches, and how wide the window is. So where our own output is a terminal, mpirun's is
one too: a pseudo-terminal of the same size.
"""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import termios
import threading
import tty
from collections.abc import Callable
from contextlib import suppress

_CHUNK = 1 << 16
_SANE = b"\x1b[0m\x1b[?25h"  # plain colours, cursor shown


class PassedOn:
    """An output for a command. `theirs` is the descriptor to give it; what it writes goes to `ours` and to `heard`."""

    def __init__(self, ours: int, heard: Callable[[bytes], object]) -> None:
        self._ours, self._heard = ours, heard
        self._terminal = os.isatty(ours)
        if self._terminal:
            self._source, self.theirs = pty.openpty()
            tty.setraw(self.theirs)  # the real terminal turns line feeds into new lines
            self.resize()
        else:
            self._source, self.theirs = os.pipe()
        self._thread = threading.Thread(target=self._copy, name="mpirun's output", daemon=True)

    def start(self) -> None:
        """Begin to copy, once the command has its descriptor."""
        os.close(self.theirs)
        self._thread.start()

    def resize(self) -> None:
        """Give the command's terminal the size of ours."""
        if self._terminal:
            with suppress(OSError):
                size = fcntl.ioctl(self._ours, termios.TIOCGWINSZ, struct.pack("HHHH", 0, 0, 0, 0))
                fcntl.ioctl(self._source, termios.TIOCSWINSZ, size)

    def finish(self, seconds: float) -> None:
        """Wait until all is copied; a process that was left behind may hold the other end. Give a terminal its cursor
        back, which a display that was killed has hidden."""
        self._thread.join(seconds)
        if self._terminal:
            with suppress(OSError):
                _write_all(self._ours, _SANE)

    def _copy(self) -> None:
        with suppress(OSError):  # a pseudo-terminal's end is an error
            while data := os.read(self._source, _CHUNK):
                self._heard(data)
                with suppress(OSError):  # nobody reads us any more: the run goes on
                    _write_all(self._ours, data)
        os.close(self._source)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
