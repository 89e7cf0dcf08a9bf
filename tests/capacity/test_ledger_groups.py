"""Every name that a ledger can have is shown in a group of its kind, and no byte is lost on the way."""

import pytest

from mlx_empire.capacity import ledger_groups
from mlx_empire.capacity.ledger_groups import GROUPS, group_of, grouped

EXPECTED = {
    "weights": {"weights"},
    "optimizer": {"optimizer m", "optimizer v_codes", "optimizer remainder", "optimizer chunk"},
    "gradients": {
        "gradients",
        "root gradients",
        "embedding gradients",
        "contributions in flight",
        "tail sums",
        "tail totals before rounding",
    },
    "gathered": {"gathered units", "gathered root", "new weights of a unit"},
    "adapters": {"adapters"},
    "activations": {
        "layer inputs",
        "one layer's recompute",
        "attention",
        "un-recomputed tail",
    },
    "logits": {"logits chunk"},
    "other": {"exchange buffers", "MLX base", "allocator margin"},
}


@pytest.mark.parametrize(("group", "name"), [(g, n) for g, names in EXPECTED.items() for n in sorted(names)])
def test_a_name_stands_in_its_group(group, name):
    assert group_of(name) == group


def test_every_name_of_the_ledger_has_a_group_of_its_kind():
    assert {name for name in ledger_groups._TERMS if group_of(name) == "other"} == EXPECTED["other"]


def test_the_groups_add_up_to_the_ledger():
    ledger = {name: 3**i for i, name in enumerate(ledger_groups._TERMS)} | {"something new": 5}
    sums = grouped(ledger)
    assert sum(sums.values()) == sum(ledger.values())
    assert list(sums) == [group.key for group in GROUPS if group.key in sums]
    assert "adapters" not in grouped({"weights": 3, "adapters": 0})
