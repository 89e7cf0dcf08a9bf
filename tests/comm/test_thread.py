"""The communication thread: order, results, failures, times."""

import gc
import threading
import time
import weakref

import numpy as np
import pytest

from mlx_empire.comm.thread import CommThread


def test_operations_run_in_order_in_one_thread() -> None:
    seen: list[tuple[int, int]] = []

    def operation(number: int) -> int:
        seen.append((number, threading.get_ident()))
        return number * number

    with CommThread() as thread:
        futures = [thread.submit(operation, number) for number in range(50)]
        assert [thread.wait(future) for future in futures] == [number * number for number in range(50)]
    assert [number for number, _ in seen] == list(range(50))
    assert {ident for _, ident in seen}.isdisjoint({threading.get_ident()})
    assert len({ident for _, ident in seen}) == 1


def test_waiting_is_measured_apart_from_working() -> None:
    """An operation works for 0.1 s before it is waited for, and until 0.1 s after: both at least, on any machine."""
    over = threading.Event()
    with CommThread() as thread:
        future = thread.submit(over.wait)
        time.sleep(0.1)
        threading.Timer(0.1, over.set).start()
        thread.wait(future)
        waited, busy = thread.reset()
        assert waited > 0.09
        assert busy - waited > 0.05
        assert thread.reset() == (0.0, 0.0)


def test_after_a_failure_nothing_runs_any_more() -> None:
    ran = []
    with CommThread() as thread:
        failing = thread.submit(lambda: 1 / 0)
        later = thread.submit(ran.append, 1)
        for future in (failing, later):
            with pytest.raises(ZeroDivisionError):
                thread.wait(future)
    assert ran == []


def test_arguments_are_freed_as_soon_as_they_are_used() -> None:
    """Whole layers pass through here: nothing may keep them while the thread waits for work."""
    with CommThread() as thread:
        layer = np.zeros(10)
        freed = weakref.ref(layer)
        future = thread.submit(np.sum, layer)
        del layer
        assert thread.wait(future) == 0.0
        gc.collect()
        assert freed() is None


def test_closing_twice_is_closing_once() -> None:
    thread = CommThread()
    thread.close()
    thread.close()
    with pytest.raises(AssertionError):
        thread.submit(int)
