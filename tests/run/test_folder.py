"""What a run writes of its plan for who looks on."""

from __future__ import annotations

import pytest
from support.planning import llama_like, node_of, recipe_of

from mlx_empire.run import folder
from mlx_empire.run.folder import planned_seconds

GIB = 2**30
NODES = [node_of(f"node-{i}", 200 * GIB, chip="M3-Ultra", link_bytes_per_second=1e9) for i in range(2)]


def test_a_step_of_twice_the_rows_is_planned_to_take_nearly_twice_as_long() -> None:
    spec = llama_like(8, 1024)
    one, two = (
        planned_seconds(recipe_of(f"batch.global_size={rows}"), spec, NODES) or [] for rows in (64, 128)
    )
    assert 0 < one[0] < one[1]
    assert one[0] * 1.5 < two[0] < one[0] * 2.1


def test_nothing_is_planned_for_chips_that_are_not_known_and_no_run_ends_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert planned_seconds(recipe_of(), llama_like(), [node_of("pc", 200 * GIB)]) is None
    monkeypatch.setattr(folder, "pace_of", None)
    assert planned_seconds(recipe_of(), llama_like(), NODES) is None
