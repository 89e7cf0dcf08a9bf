"""Who reads a schedule knows every action, fails loudly at another, and can be taught one: stages on paper."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from support.planning import llama_like

from mlx_empire.engine.evaluations import Evaluations
from mlx_empire.engine.step import StreamedStep
from mlx_empire.optim.adamw import AdamW
from mlx_empire.plan.actions import Action, Reader, Stash, StepShape
from mlx_empire.plan.schedule import evaluation, training_step
from mlx_empire.plan.shards import make_plan
from mlx_empire.plan.step_bytes import StepBytes
from mlx_empire.plan.step_traffic import StepTraffic
from mlx_empire.plan.workload import CellLayout, Workload

SPEC = llama_like(layers=3)
WORK = Workload(1, 64, CellLayout(4, 2, 2), 0, "float32", "auto", 4096)
PLAN = make_plan(SPEC.units, [2, 1], 3)
SHAPE = StepShape(3, PLAN.trained, (2,))


def readers() -> list[Reader]:
    """One of each kind."""
    return [
        StreamedStep(None, SimpleNamespace(evaluate=Evaluations()), None, SHAPE),  # type: ignore[arg-type]
        StepBytes(SPEC, PLAN, WORK, 0, AdamW().state_bytes),
        StepTraffic(PLAN, WORK),
    ]


@pytest.mark.parametrize("reader", readers(), ids=lambda r: type(r).__name__)
def test_a_reader_that_does_not_know_an_action_fails_loudly(reader):
    with pytest.raises(NotImplementedError, match=f"{type(reader).__name__}.*'teleport'"):
        reader.play([Action("teleport")])


def test_the_readers_know_every_kind_of_action():
    stash = Stash(((1, (0,)),), 1)
    shapes = [StepShape(stage, (True,) * 3, (2,), stash=stash, offload=True) for stage in range(4)]
    kinds = {a.kind for shape in shapes for a in training_step(shape)}
    assert {"forward", "stash", "backward", "reuse", "offload", "evict", "prefetch", "fetch"} <= kinds
    kinds |= {a.kind for a in evaluation(SHAPE)}
    assert [(type(r).__name__, k) for r in readers() for k in kinds if not hasattr(r, k)] == []


# ---- a schedule that is not built: layers stay where they are, hidden states travel (breadth-first stages)


def looped_stages(rank: int, ranks: int, layers: int, micros: int) -> Iterator[Action]:
    """Layer u lives on rank (u - 1) mod `ranks`; every visit runs all micro-batches (arXiv:2211.05953)."""
    owner = [(u - 1) % ranks for u in range(1, layers + 1)]
    for u in range(1, layers + 1):
        if owner[u - 1] == rank:
            for m in range(micros):
                if u > 1:
                    yield Action("receive", owner[u - 2], m)
                yield Action("forward", u, m)
                if u < layers:
                    yield Action("send", owner[u], m)


class StageBytes(StepBytes):
    """The ledger of a rank whose layers stay: a hidden state that has come is one more."""

    def receive(self, action: Action) -> None:
        self._hold("layer inputs", self._hidden)

    def send(self, action: Action) -> None:
        self._hold("layer inputs", -self._hidden)


class StageTraffic(StepTraffic):
    """Bytes of hidden states that a rank sends."""

    def __init__(self, rank: int) -> None:
        super().__init__(PLAN, WORK)
        self._own = rank
        self.hidden = 64 * 256 * 2

    def send(self, action: Action) -> None:
        self.reduced[self._own][action.unit] += self.hidden

    receive = Reader.nothing


def test_a_schedule_of_stages_fits_ledger_and_traffic():
    """By hand: 3 layers on 2 ranks; each of 4 micro-batches crosses to rank 1 and back; one hidden state is 32 KiB."""
    sent = []
    for rank in (0, 1):
        traffic = StageTraffic(rank)
        traffic.play(looped_stages(rank, 2, 3, 4))
        sent.append(traffic.reduced.tolist()[rank])
    assert sent == [[0, 4 * 32768], [4 * 32768, 0]]
    ledger = StageBytes(SPEC, PLAN, WORK, 1, AdamW().state_bytes)
    ledger.play(looped_stages(1, 2, 3, 4))
    # The layer's inputs of all 4 micro-batches are kept for a backward; one more is on its way out.
    assert ledger.phases["forward"]["layer inputs"] == (3 + 1) * 32768
