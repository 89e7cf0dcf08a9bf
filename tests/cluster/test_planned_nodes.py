"""A hostfile looked at from one desk: what it says counts, this machine fills its own gaps, no other can."""

import pytest

from mlx_empire.cluster.hostfile import Node, parse_hostfile
from mlx_empire.cluster.match import planned_nodes
from mlx_empire.errors import UserError

GIB = 2**30
OWN = Node("desk.local", 1, None, 64 * GIB, 40 * GIB, None, "M9")


def planned(text: str) -> list[Node]:
    return planned_nodes(parse_hostfile(text, "x"), OWN)


def test_what_the_hostfile_says_counts():
    king, soldier = planned(
        "king # role=king memory=512GiB\nsoldier # memory=256GiB limit=200GiB chip=M3-Ultra\n"
    )
    assert king == Node("king", 1, "king", 512 * GIB, 464 * GIB, None, None)
    assert (soldier.limit_bytes, soldier.chip) == (200 * GIB, "M3-Ultra")


def test_slots_divide_a_host():
    assert [n.memory_bytes for n in planned("far slots=2 # memory=128GiB\n")] == [64 * GIB] * 2


@pytest.mark.parametrize("name", ["localhost", "desk.local", "DESK.local", "127.0.0.1"])
def test_this_machine_is_measured(name):
    (node,) = planned(f"{name} slots=1\n")
    assert (node.memory_bytes, node.limit_bytes, node.chip) == (64 * GIB, 40 * GIB, "M9")


def test_another_machine_must_be_described():
    with pytest.raises(UserError, match=r"^x:2: far: .*memory=256GiB") as refused:
        planned("desk.local\nfar slots=2\n")
    assert "\n" not in str(refused.value)
