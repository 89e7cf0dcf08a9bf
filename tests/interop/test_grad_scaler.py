"""The dynamic loss scale against torch's own GradScaler, which decides the same of the same gradients."""

from __future__ import annotations

import random

import pytest

from mlx_empire.engine.loss_scale import MOST, LossScale

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("seed", range(5))
def test_scale_and_skipped_steps_are_those_of_torch(seed):
    draw = random.Random(seed)
    window = draw.randint(1, 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=window)
    ours = LossScale(2.0**12, window)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale(torch.zeros(1))  # torch makes its scale at the first use
    for _ in range(30):
        overflow = draw.random() < 0.3
        if (overflow and not ours.may_fall) or ours.value == MOST:  # torch's has no bounds
            break
        weight.grad = torch.full((1,), float("inf") if overflow else scaler.get_scale())
        before = weight.item()
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            ours.overflowed()
        else:
            ours.held()
        assert (weight.item() == before) == overflow
        assert scaler.get_scale() == ours.value
