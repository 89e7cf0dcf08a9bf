"""With strict bits a layer's forward runs where its recomputation runs: in a gradient trace. Here no bit hangs on it.

On a GPU its input is traced, and MLX's own behaviour shows it: what is evaluated meanwhile keeps what it was computed
from, and outside of a trace it does not. On a CPU nothing is traced within the trace (`metal/test_fast_calls.py`).
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from support.stepping import Case, batches_of, counted_tokens, own_batches, trainer_of

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine.trainer import Trainer

COMM = SoloCommunicator("here")
LARGE = 1 << 22  # elements, which no part of the tiny model comes near


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """By call of a layer, whether a gradient trace was on."""
    from mlx_lm.models.llama import TransformerBlock

    found: list[bool] = []
    plain = TransformerBlock.__call__

    def watched(self: TransformerBlock, x: mx.array, *rest: object, **more: object) -> mx.array:
        large = mx.arange(LARGE, dtype=mx.float32) + x.sum()
        small = large.sum()
        before = mx.get_active_memory()
        del large
        mx.eval(small)
        found.append(mx.get_active_memory() - before > 2 * LARGE)
        return plain(self, x, *rest, **more)

    monkeypatch.setattr(TransformerBlock, "__call__", watched)
    return found


def trainer_like_on_a_gpu(case: Case, thread: CommThread) -> Trainer:
    trainer = trainer_of(case, COMM, thread)
    assert trainer.streamed._passes.in_full is False
    trainer.streamed._passes.in_full = True
    return trainer


def compute(trainer: Trainer, case: Case) -> float:
    batches = batches_of(case)
    return trainer.compute(own_batches(trainer, batches, 0), counted_tokens(batches))


@pytest.mark.parametrize("strict", [True, False])
def test_the_forward_runs_in_a_gradient_trace_where_bits_are_strict_and_in_evaluations_never(traced, strict):
    case = Case(micro_batches=1, rows=1, tail=1, strict=strict)
    with CommThread() as thread:
        trainer = trainer_like_on_a_gpu(case, thread)
        layers = len(trainer.spec.units) - 1
        traced.clear()  # of the probe
        compute(trainer, case)
        forward, rest = traced[: layers - 1], traced[layers - 1 :]
        assert forward == [strict] * (layers - 1)
        assert rest == [True] * layers  # the last layer in the head, the others again in the backward
        traced.clear()
        trainer.streamed.losses(batches_of(case), 1)
        assert traced == [False] * layers


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma2"])
def test_on_the_cpu_no_bit_hangs_on_it(family):
    found = []
    for strict, make in ((False, trainer_of), (True, trainer_of), (True, None)):
        case = Case(family, micro_batches=2, strict=strict, kept=0.5)
        with CommThread() as thread:
            one = trainer_like_on_a_gpu(case, thread) if make is None else make(case, COMM, thread)
            loss = compute(one, case)
            totals = [np.array(t) for unit in one.gradients.totals.values() for t in unit]
        found.append((loss, totals))
    (loss, totals), *others = found
    for other_loss, other in others:
        assert loss == other_loss
        assert all(np.array_equal(a, b) for a, b in zip(totals, other, strict=True))
