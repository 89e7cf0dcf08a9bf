"""What a rank says of where it is in a step."""

from __future__ import annotations

from unittest.mock import MagicMock

import pytest

from mlx_empire import progress
from mlx_empire.engine.step import StreamedStep
from mlx_empire.plan.actions import StepShape


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("rounds", [1, 2])
def test_a_rank_without_micro_batches_is_in_no_pass(stage: int, rounds: int) -> None:
    """It waits for the others' gathers and reductions, and says so all the while."""
    seen: list[tuple[str, str]] = []

    def note(what: str) -> MagicMock:
        return MagicMock(
            side_effect=lambda *_, **__: seen.append((what, progress.places()["MainThread"].phase))
        )

    store, sums = MagicMock(bind=note("bind")), MagicMock(reduce=note("reduce"), settle=note("settle"))
    progress.reach("data")
    step = StreamedStep(MagicMock(), store, sums, StepShape(stage, (True, True, True), (1,)))
    assert step.gradients([[]] * rounds, 1) == []
    assert {phase for _, phase in seen} == {"collectives"}
    assert {what for what, _ in seen} == {"bind", "reduce", "settle"}
