"""What must be equal on all ranks, and the table of what is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlx_empire.comm.checks import environment, self_test, shake_hands
from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.errors import NumericsError, UserError


class Told(SoloCommunicator):
    """Three ranks of which two are played by the test."""

    def __init__(self, *others: dict[str, Any]) -> None:
        super().__init__("king")
        self.hostnames = ["king", "soldier-1", "soldier-2"]
        self._others = others

    def gather_json(self, value: Any) -> list[Any]:
        return [value, *self._others]


def test_equal_ranks_pass() -> None:
    facts = environment()
    assert None not in facts.values()
    assert {"mlx", "mlx-lm", "numpy", "python", "mlx_empire", "platform"} <= facts.keys()
    shake_hands(Told(facts, facts), facts, "")
    shake_hands(SoloCommunicator("king"), facts, "")


def test_what_a_rank_does_not_know_is_not_compared() -> None:
    shake_hands(Told({"model": None}, {}), {"model": "1234"}, "")


def test_a_difference_is_shown_by_rank() -> None:
    with pytest.raises(UserError) as raised:
        shake_hands(
            Told({"a": "1", "b": "x" * 90, "c": None}, {"a": "1", "b": "2", "c": "5"}),
            {"a": "1", "b": "2", "c": "4"},
            "mend it",
        )
    first, header, *rows = str(raised.value).splitlines()
    assert first == "ranks differ in b, c; mend it"
    assert header.split("  ")[-3:] != []
    assert [host in header for host in ("rank 0 on king", "rank 1 on soldier-1", "rank 2 on soldier-2")] == [
        True
    ] * 3
    assert [row.split() for row in rows] == [["b", "2", "x" * 48, "2"], ["c", "4", "-", "5"]]
    assert raised.value.shared
    assert raised.value.exit_code == 64


class Wrong(SoloCommunicator):
    """A reduction that loses one bit."""

    def reduce_scatter(self, contribution: Any, edges: Any, total: Any, *others: Any) -> None:
        super().reduce_scatter(contribution, edges, total, *others)
        total.view(np.uint32)[-1:] ^= 1


def test_the_self_test_finds_one_wrong_bit() -> None:
    self_test(SoloCommunicator("king"))
    with pytest.raises(NumericsError, match=r"rank 0 on king: reduce-scatter of float32 from rank 0"):
        self_test(Wrong("king"))
