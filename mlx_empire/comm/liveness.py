"""What this process tells its watchdog: which threads wait for other ranks, and when a message moved last.

Waiting is not hanging: a rank that waits is as healthy as the one it waits for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_waiting: dict[str, float] = {}  # thread name -> since when (time.monotonic)
_moved = 0.0
_watched = False


@contextmanager
def waiting() -> Iterator[None]:
    """Around everything in which this thread can only go on when another rank does something."""
    name = threading.current_thread().name
    _waiting[name] = time.monotonic()
    try:
        yield
    finally:
        _waiting.pop(name, None)
        moved()


def moved() -> None:
    """A message has come or gone."""
    global _moved
    _moved = time.monotonic()


def last_moved() -> float:
    """When that was (time.monotonic); 0 if never."""
    return _moved


def waits(thread: str) -> bool:
    """Whether a thread waits for other ranks."""
    return thread in _waiting


def watch(running: bool) -> None:
    """A watchdog decides from now on, or no more, when a silent peer counts as lost."""
    global _watched
    _watched = running


def watched() -> bool:
    """Whether a watchdog decides that."""
    return _watched
