"""What a run writes of its plan for who looks on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from support.planning import llama_like, node_of, recipe_of

from mlx_empire.cluster.hostfile import Node
from mlx_empire.data.splits import Splits
from mlx_empire.errors import UserError
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.resolve import resolve
from mlx_empire.run import folder
from mlx_empire.run.folder import planned_seconds, refuse_other_scorers, write_plan
from mlx_empire.run.names import plan_of

GIB = 2**30
NODES = [node_of(f"node-{i}", 200 * GIB, chip="M3-Ultra", link_bytes_per_second=1e9) for i in range(2)]


def planned(nodes: Sequence[Node], *changes: str) -> list[float] | None:
    """What is said of a recipe whose plan is made."""
    recipe, spec = recipe_of(*changes), llama_like(8, 1024)
    plan = resolve(recipe, spec, nodes, state_bytes_of(recipe.optimizer))
    return planned_seconds(recipe, plan, spec, nodes)


def test_a_step_of_twice_the_rows_is_planned_to_take_nearly_twice_as_long() -> None:
    one, two = (planned(NODES, f"batch.global_size={rows}") or [] for rows in (64, 128))
    assert 0 < one[0] < one[1]
    assert one[0] * 1.5 < two[0] < one[0] * 2.1


def test_the_seconds_are_those_of_the_plan_that_the_run_goes_by() -> None:
    recipe, spec = recipe_of("batch.global_size=64"), llama_like(8, 1024)
    longer = recipe_of("batch.global_size=128")
    plan = resolve(longer, spec, NODES, state_bytes_of(longer.optimizer))
    assert planned_seconds(recipe, plan, spec, NODES) == planned(NODES, "batch.global_size=128")


def test_a_run_goes_on_with_the_scorers_that_it_began_with_or_with_what_it_accepts(tmp_path: Path) -> None:
    def write(digest: str, *words: str, resumed: bool) -> dict[str, str]:
        recipe, spec = recipe_of(f"run.dir={tmp_path}", *words), llama_like(8, 1024)
        plan = resolve(recipe, spec, NODES, state_bytes_of(recipe.optimizer))
        if resumed:
            refuse_other_scorers(recipe, {"mine.py": digest})
        splits = Splits(None, None, [], "rows")  # type: ignore[arg-type]
        write_plan(recipe, plan, NODES, spec, splits, 3, resumed=resumed, scorers={"mine.py": digest})
        return dict(plan_of(tmp_path)["scorers"])

    assert write("one", resumed=False) == {"mine.py": "one"}
    assert write("one", resumed=True) == {"mine.py": "one"}
    with pytest.raises(
        UserError, match=r"mine\.py holds other code .* run\.accept_changes=\[evaluation\.sets\]"
    ):
        write("two", resumed=True)
    assert write("two", "run.accept_changes=[evaluation.sets]", resumed=True) == {"mine.py": "two"}
    assert write("three", resumed=False) == {"mine.py": "three"}


def test_nothing_is_planned_for_chips_that_are_not_known_and_no_run_ends_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreadable(*words: object) -> None:
        raise UserError("the layer's graph cannot be read")

    assert planned([node_of("pc", 200 * GIB)]) is None
    monkeypatch.setattr(folder, "pace_of", unreadable)
    assert planned(NODES) is None
