"""Every name that a ledger can have says what it stands for and how well it is known."""

import pytest
from support.planning import assess, llama_like, nodes_of, recipe_of

from mlx_empire.capacity.ledger_groups import UNKNOWN, term


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["memory.zero_stage=3", "memory.gradient_checkpointing=false"],
        ["memory.zero_stage=1", "optimizer.state_bits=32"],
        ["optimizer.master_weights=diet"],
        ["tuning.type=dora"],
        ["distillation.teacher=teacher"],
        ["tuning.type=qlora", "tuning.bits=2"],
    ],
)
def test_every_name_is_described(overrides):
    found = assess(recipe_of(*overrides), llama_like(), nodes_of([2**34, 2**33]))
    for node in found.nodes:
        for items in (node.ledger.resident, *node.ledger.phases.values()):
            for name in items:
                assert term(name) is not UNKNOWN, name
                assert term(name).known in ("exact", "derived", "fitted", "unmeasured")
