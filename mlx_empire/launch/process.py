"""Runs one mpirun from start to end: passes on what it says, forwards a request to stop, and does not wait for ever
when it cannot end.

mpirun gets a session of its own: the terminal's Ctrl-C would reach it, and give its ranks half a second.

Its output is passed on byte by byte, and we read it too. Open MPI announces the loss of a machine on standard output,
so that has to be read. Yet the ranks look at mpirun's output to see whether a person watches, and how wide the window
is. So where our own output is a terminal, mpirun's is one too: a pseudo-terminal of the same size.
"""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from mlx_empire.launch.ending import Events, Listener

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


TICK_SECONDS = 0.1
# After a failure was announced mpirun ends its ranks in seconds, more where they hold hundreds of gigabytes; a machine
# that is out of reach would keep it waiting.
GRACE_SECONDS = 60.0
KILL_SECONDS = 5.0


@dataclass
class Asked:
    """What the user wants while a run runs; signal handlers set it. `times`: requests to stop; the second is urgent."""

    times: int = 0

    def stop(self) -> None:
        """One more request."""
        self.times += 1


@dataclass
class LaunchProcess:
    """One launch. `on_tick` is called several times a second while it runs; `grace` seconds may pass between the news
    of a failure and mpirun's end."""

    command: Sequence[str]
    environment: Mapping[str, str]
    asked: Asked
    on_tick: Callable[[Events], None] = lambda events: None
    grace: float = GRACE_SECONDS
    events: Events = field(default_factory=Events)
    seconds: float = 0.0

    def run(self) -> int:
        """mpirun's exit code, negative for a signal that ended it."""
        started = time.monotonic()
        sys.stdout.flush()
        self._output = PassedOn(1, Listener(self.events).feed)
        process = subprocess.Popen(
            self.command,
            env=dict(self.environment),
            stdin=subprocess.DEVNULL,
            stdout=self._output.theirs,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._output.start()
        reader = threading.Thread(target=self._read, args=(process,), name="mpirun's stderr", daemon=True)
        reader.start()
        self._watch(process)
        self._bury()
        reader.join(KILL_SECONDS)  # a rank that mpirun left behind on another machine may hold the pipe
        self._output.finish(KILL_SECONDS)
        self.seconds = time.monotonic() - started
        return process.returncode

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        forwarded = False
        ending: float | None = None  # when it should be over
        last_signal = signal.SIGTERM
        while True:
            try:
                process.wait(TICK_SECONDS)
                return
            except subprocess.TimeoutExpired:
                pass
            now = time.monotonic()
            self.on_tick(self.events)
            self._output.resize()
            if self.asked.times and not forwarded:
                forwarded = True
                _send(process, signal.SIGUSR1)
            if ending is None and self.events.failing:
                ending = now + self.grace
            if self.asked.times > 1 and last_signal == signal.SIGTERM:
                ending = now
            if ending is not None and now >= ending:
                self._end(process, last_signal)
                ending, last_signal = now + KILL_SECONDS, signal.SIGKILL

    def _end(self, process: subprocess.Popen[bytes], number: signal.Signals) -> None:
        """End mpirun; at last with all that it started here: ranks, and the ssh to machines out of reach."""
        if number == signal.SIGTERM:
            _send(process, number)
            return
        say(
            "mpirun does not end; it is killed. Ranks on machines out of reach end themselves at their deadline."
        )
        for pid in [*descendants(process.pid), process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _bury(self) -> None:
        """See that the ranks on this machine have ended: when Open MPI loses a machine, mpirun may leave them behind,
        and they would hold the memory and the run's lock."""
        here = socket.gethostname()
        left = [pid for rank, pid in self.events.pids.items() if self.events.hosts[rank] == here]
        deadline = time.monotonic() + KILL_SECONDS
        while (left := [pid for pid in left if _trains(pid)]) and time.monotonic() < deadline:
            time.sleep(TICK_SECONDS)
        for pid in left:
            say(f"mpirun left process {pid} behind; it is killed")
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        listener = Listener(self.events)
        while data := os.read(process.stderr.fileno(), _CHUNK):
            _show(listener.feed(data))
        _show(listener.close())


def _send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(number)


def _trains(pid: int) -> bool:
    """Whether this process is still one of ours: its number may belong to another by now."""
    with suppress(OSError):
        listed = subprocess.run(
            ["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=False
        )
        return "mlx_empire.train" in listed.stdout
    return False


def descendants(pid: int) -> list[int]:
    """The processes that `pid` started on this machine, directly or not."""
    try:
        listed = subprocess.check_output(["ps", "-A", "-o", "pid=,ppid="], text=True)
    except (OSError, subprocess.SubprocessError):
        return []
    children: dict[int, list[int]] = {}
    for line in listed.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    found = list(children.get(pid, []))
    for child in found:  # which grows meanwhile
        found += children.get(child, [])
    return found


def _show(text: str) -> None:
    if text:
        with suppress(OSError):  # the terminal may be gone, and the run must not notice
            sys.stderr.write(text)
            sys.stderr.flush()


def say(text: str) -> None:
    """A line of the launcher's own."""
    _show(f"mlx_empire.launch: {text}\n")
