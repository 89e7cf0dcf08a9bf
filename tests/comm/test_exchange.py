"""How long an exchange waits, on a clock that the test plays; what moves between real ranks is in `tests/mpi/`."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlx_empire.comm.messages import Stream
from mlx_empire.errors import LostRankError

DEADLINE = 10.0


@pytest.fixture
def exchange(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with an MPI that moves a message when `clock.moves` says, and time in steps of a second."""
    clock = SimpleNamespace(now=0.0, moves=set())

    def monotonic() -> float:
        clock.now += 1.0
        return clock.now

    def tested(requests: list[Any]) -> list[int]:
        return [0] if clock.now in clock.moves else []

    mpi = SimpleNamespace(Intracomm=object, BYTE=None, Request=SimpleNamespace(Testsome=tested))
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi))
    monkeypatch.delitem(sys.modules, "mlx_empire.comm.exchange", raising=False)
    module = importlib.import_module("mlx_empire.comm.exchange")
    del sys.modules["mlx_empire.comm.exchange"]  # nobody else gets this one
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=monotonic))
    monkeypatch.setattr(module, "pause", lambda seconds: None)
    module.clock = clock
    return module


def waited(exchange: ModuleType, added_until: float) -> float:
    """When a message of a peer that never sends is given up, while threads add until then."""
    clock = exchange.clock
    communicator = SimpleNamespace(Irecv=lambda *_: object())
    one = exchange.Exchange(communicator, ["here", "there"], DEADLINE)
    stream = Stream(1, False, 1, lambda k: np.empty(1, np.uint8))
    with pytest.raises(LostRankError, match="rank 1 on there"):
        one.run("reduce-scatter", 1, [stream], beside=lambda: clock.now < added_until)
    return clock.now


@pytest.mark.parametrize("added_until", [0, 3, 3 * DEADLINE])
def test_the_deadline_counts_from_when_nothing_was_being_added_any_more(exchange, added_until) -> None:
    assert waited(exchange, added_until) == pytest.approx(added_until + DEADLINE, abs=2)


def test_a_message_that_comes_after_long_adding_comes_in_time(exchange) -> None:
    clock = exchange.clock
    clock.moves = {4 * DEADLINE - 1}
    one = exchange.Exchange(SimpleNamespace(Irecv=lambda *_: object()), ["here", "there"], DEADLINE)
    stream = Stream(1, False, 1, lambda k: np.empty(1, np.uint8))
    one.run("reduce-scatter", 1, [stream], beside=lambda: clock.now < 3 * DEADLINE)
    assert stream.finished == 1
