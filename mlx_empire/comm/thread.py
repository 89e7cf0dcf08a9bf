"""The communication thread: data-plane operations in one queue, beside the computation.

Decides that operations run one after the other in the order of submission, and that after a failure none
runs any more: the ranks would no longer agree on what comes next.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from types import TracebackType
from typing import Any, TypeVar

from mlx_empire import progress

T = TypeVar("T")
Name = tuple[str, int]  # of an operation: what it does, and to which unit


class CommThread:
    """A daemon thread with a first-in, first-out queue.

    waited_seconds: how long `wait` blocked its callers: communication that computation did not hide. waited_for: that
    by what was waited for. busy_seconds: how long operations ran. All since the last `reset`. observe: told of every
    operation that was named, with its beginning and end by `time.perf_counter`.
    """

    def __init__(self, name: str = "communication") -> None:
        self.waited_seconds = 0.0
        self.busy_seconds = 0.0
        self.waited_for: dict[str, float] = {}
        self.observe: Callable[[Name, float, float], None] | None = None
        self._tasks: SimpleQueue[
            tuple[Future[Any], Callable[..., Any], tuple[Any, ...], Name | None] | None
        ] = SimpleQueue()
        self._failure: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[..., T], *arguments: Any, name: Name | None = None) -> "Future[T]":
        """Queue function(*arguments); its result or exception is the future's."""
        assert not self._closed, "the communication thread is closed"
        future: Future[T] = Future()
        self._tasks.put((future, function, arguments, name))
        return future

    def wait(self, future: "Future[T]", what: str = "other") -> T:
        """The future's result, its exception raised; the time spent here counts as waited, for `what`."""
        start = time.perf_counter()
        try:
            with progress.waiting():
                return future.result()
        finally:
            seconds = time.perf_counter() - start
            self.waited_seconds += seconds
            self.waited_for[what] = self.waited_for.get(what, 0.0) + seconds

    def reset(self) -> tuple[float, float]:
        """(waited_seconds, busy_seconds) so far; starts both again. For step borders, when nothing is
        queued."""
        seconds = self.waited_seconds, self.busy_seconds
        self.waited_seconds = self.busy_seconds = 0.0
        self.waited_for = {}
        return seconds

    def close(self, seconds: float = 60.0) -> None:
        """Let what is queued finish, at most for `seconds`, and end the thread; again: nothing."""
        if not self._closed:
            self._closed = True
            self._tasks.put(None)
            self._thread.join(seconds)

    def __enter__(self) -> "CommThread":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(60.0 if error is None else 0.0)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, function, arguments, name = task
            del task  # the loop must not keep arguments (whole layers) alive while it waits for the next task
            if self._failure is not None:
                future.set_exception(self._failure)
                continue
            start = time.perf_counter()
            try:
                result = function(*arguments)
            except BaseException as error:
                self._failure = error
                result = None
            end = time.perf_counter()
            self.busy_seconds += end - start
            observe = self.observe
            if observe is not None and name is not None:
                observe(name, start, end)
            del function, arguments
            if self._failure is None:
                future.set_result(result)
            else:
                future.set_exception(self._failure)
            del future, result
