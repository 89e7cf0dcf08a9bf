"""A request to stop is noticed whatever way it comes, agreed on by all ranks, and never inherited by the next run."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.run.stop import SIGNALS, STOP_FILE, StopRequest, request_stop


class Answers:
    """Three ranks of which the others' answers are given."""

    size, rank = 3, 0
    hostnames = ("king", "soldier-1", "soldier-2")

    def __init__(self, *others: str | None) -> None:
        self.others = others

    def gather_json(self, value: Any) -> list[Any]:
        return [value, *self.others]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request(number: signal.Signals) -> None:
    solo = SoloCommunicator("king")
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.agreed(solo) is None
        os.kill(os.getpid(), number)
        assert stop.agreed(solo) == ("Ctrl-C" if number == signal.SIGINT else number.name)
    assert signal.getsignal(number) is before


def test_the_second_ctrl_c_ends_at_once() -> None:
    with StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_forwarded_signal_may_come_twice() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.reason == "SIGUSR1"


def test_the_file_is_a_request_once(tmp_path: Path) -> None:
    solo = SoloCommunicator("king")
    with StopRequest() as stop:
        stop.watch(tmp_path)
        assert stop.agreed(solo) is None
        request_stop(tmp_path)
        assert STOP_FILE in str(stop.agreed(solo))
    assert list(tmp_path.iterdir()) == []


def test_a_file_left_over_does_not_stop_the_next_run(tmp_path: Path) -> None:
    request_stop(tmp_path)
    os.utime(tmp_path / STOP_FILE, (time.time() - 60, time.time() - 60))
    with StopRequest() as stop:
        stop.watch(tmp_path)
        assert stop.agreed(SoloCommunicator("king")) is None
    assert list(tmp_path.iterdir()) == []


def test_a_file_made_while_the_run_still_loads_counts(tmp_path: Path) -> None:
    with StopRequest() as stop:
        request_stop(tmp_path)
        stop.watch(tmp_path)
        assert stop.reason is not None


def test_one_rank_is_enough(tmp_path: Path) -> None:
    with StopRequest() as stop:
        stop.watch(tmp_path)
        assert stop.agreed(Answers(None, None)) is None  # type: ignore[arg-type]
        assert stop.agreed(Answers(None, "SIGTERM")) == "SIGTERM on soldier-2"  # type: ignore[arg-type]
