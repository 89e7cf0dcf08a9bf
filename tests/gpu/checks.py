"""What a GPU is asked, and what the CPU says to it: steps, optimizers, memory that is written while kernels run.

A step is compared in its loss and its gradients, before an optimizer's first step turns a gradient's sign into a whole
learning rate. Gradients are compared as one vector within the tolerance, and tensor by tensor within three times that,
for the tensor that differs most is an extreme of many. An optimizer is given the same gradients on both devices.

Where experts are chosen by rank, a rounding may choose another one and change everything: all are chosen here. MLX has
no bfloat16 mixtures on a CPU, so their reference is in float32.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isnan

import mlx.core as mx
import numpy as np
from metal.settings import SETTINGS, SMALL
from support.stepping import (
    Case,
    batches_of,
    counted_tokens,
    optimizer_of,
    own_batches,
    trainer_of,
)
from support.tiny_models import MIXTURES
from support.tuning import TunedCase, tuned_trainer

from mlx_empire.comm.buffers import empty_rows, host_view
from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine.trainer import Trainer
from mlx_empire.model.attention.fused import allow_sinks
from mlx_empire.optim.protocol import ChunkId, StepScalars

TOLERANCE = {"float32": 2e-3, "bfloat16": 3e-2}
A_TENSOR = 3  # times the tolerance of all together
SMALLEST = (
    1e-2  # of the longest tensor's gradient: shorter ones, in good part rounding, are compared with that
)
LEARNING_RATE = 1e-3
LONG_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}  # those that Metal fuses


@dataclass(frozen=True)
class Row:
    """A line of the table: how much the GPU differs from the CPU, relatively, and where most."""

    what: str
    dtype: str
    found: float
    allowed: float
    where: str

    @property
    def good(self) -> bool:
        """Whether the difference is allowed; NaN is not."""
        return self.found <= self.allowed


@dataclass(frozen=True)
class Step:
    """The loss of a step, its gradients by name (flat, float32), and the loss after one update."""

    loss: float
    gradients: dict[str, np.ndarray]
    after: float


def step_cases() -> dict[str, Case]:
    """The Metal lint's settings, heads as Metal fuses them, and mixtures in bfloat16."""
    fused = {
        f"{name}, heads of 64{dtype and f' {dtype}'}": Case(
            name, config=LONG_HEADS, dtype=dtype or "float32", **SMALL
        )
        for name in ("llama", "gemma2", "qwen3_moe", "llama4", "gpt_oss")
        for dtype in ("", "bfloat16")
    }
    mixtures = {f"{name} bfloat16": Case(name, dtype="bfloat16", **SMALL) for name in sorted(MIXTURES)}
    cases = {**SETTINGS, **fused, **mixtures}
    return {name: _all_experts(case) for name, case in cases.items()}


def _all_experts(case: Case) -> Case:
    if case.family not in MIXTURES:
        return case
    every = {"num_local_experts": 1} if case.family == "llama4" else {"num_experts_per_tok": 4}
    return replace(case, config={**case.config, **every})


@contextmanager
def computing_on(device: mx.Device) -> Iterator[None]:
    """Within it MLX computes there."""
    before = mx.default_device()
    mx.set_default_device(device)
    try:
        yield
    finally:
        mx.set_default_device(before)


def step_on(device: mx.Device, case: Case) -> Step:
    """What the case's first steps come to on a device."""
    comm = SoloCommunicator("here")
    with computing_on(device), CommThread() as thread:
        trainer = (tuned_trainer if isinstance(case, TunedCase) else trainer_of)(case, comm, thread)
        allow_sinks(tensor.name for unit in trainer.spec.units for tensor in unit.tensors)
        batches = batches_of(case)
        own, tokens = own_batches(trainer, batches, 0), counted_tokens(batches)
        loss = trainer.compute(own, tokens, 1)
        gradients = gradients_of(trainer)
        trainer.gradients.clear()
        trainer.train_step(own, tokens, 1, LEARNING_RATE)
        return Step(loss, gradients, trainer.compute(own, tokens, 2))


def gradients_of(trainer: Trainer) -> dict[str, np.ndarray]:
    """Every trained tensor's gradient, flat, in float32; of the only rank."""
    found = {}
    for unit in trainer.store.plan.units:
        segments = [segment for segment in unit.segments if segment.kind != "frozen"]
        totals = trainer.gradients.totals.get(unit.index, [])
        for segment, total in zip(segments, totals, strict=True):
            flat = np.array(total.astype(mx.float32)).reshape(-1)
            found |= {p.tensor.name: flat[p.start : p.start + p.tensor.size] for p in segment.placements}
    return found


def step_row(name: str, case: Case, gpu: mx.Device) -> Row:
    """A step on the GPU beside the CPU's."""
    on_cpu = replace(case, dtype="float32") if case.family in MIXTURES else case
    found, expected = step_on(gpu, case), step_on(mx.Device(mx.cpu), on_cpu)
    allowed = TOLERANCE[case.dtype]
    differences = gradient_differences(found.gradients, expected.gradients)
    differences["the loss"] = abs(found.loss - expected.loss) / abs(expected.loss)
    differences["the loss after an update"] = abs(found.after - expected.after) / abs(expected.after)
    where, worst = worst_of(differences)
    return Row(name, case.dtype, worst, allowed, where)


def gradient_differences(
    found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Relative differences of all gradients together, and by tensor, those divided by `A_TENSOR`."""
    lengths = {name: float(np.linalg.norm(value)) for name, value in expected.items()}
    apart = {name: float(np.linalg.norm(found[name] - value)) for name, value in expected.items()}
    floor, whole = SMALLEST * max(lengths.values()), float(np.linalg.norm(list(lengths.values())))
    by_tensor = {name: apart[name] / max(lengths[name], floor) / A_TENSOR for name in expected}
    return {**by_tensor, "all gradients": float(np.linalg.norm(list(apart.values()))) / whole}


def worst_of(differences: Mapping[str, float]) -> tuple[str, float]:
    """The name of the largest, and it; one that is not a number comes before all."""
    where = max(differences, key=lambda name: (isnan(differences[name]), differences[name]))
    return where, differences[where]


# ---- optimizers


def optimizer_cases() -> dict[str, Case]:
    """Every rule with every kind of master weight, and 8-bit and 32-bit states."""
    masters = {kind: ("bfloat16", kind) for kind in ("exact", "diet", "none", "fp32")}
    kinds = {**masters, "float32 weights": ("float32", "exact")}
    return {
        f"{rule}, {bits}-bit states, {name}": Case(
            optimizer=rule, master_weights=kept, state_bits=bits, dtype=dtype, weight_decay=0.1
        )
        for rule in ("adamw", "lion", "sgd")
        for bits in (8, 32)
        for name, (dtype, kept) in kinds.items()
    }


def updated_on(device: mx.Device, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Weights before and after three updates by gradients that are the same everywhere, float32."""
    rng = np.random.default_rng(5)
    before = rng.normal(size=(256, 64)).astype(np.float32)
    optimizer = optimizer_of(case)
    with computing_on(device):
        weights = mx.array(before).astype(getattr(mx, case.dtype))
        before = np.array(weights.astype(mx.float32))
        state = optimizer.init(weights, quantised=case.state_bits == 8)
        for step in range(1, 4):
            gradient = mx.array(rng.normal(size=before.shape).astype(np.float32))
            scalars = StepScalars(step, 1e-2, 1.0)
            weights, state = optimizer.update(weights, state, gradient, ChunkId(3, 0, True), scalars)
            mx.eval(weights, state)
        return before, np.array(weights.astype(mx.float32))


def optimizer_row(name: str, case: Case, gpu: mx.Device) -> Row:
    """How far the GPU's update is from the CPU's, by the length of the CPU's."""
    (_, found), (before, expected) = updated_on(gpu, case), updated_on(mx.Device(mx.cpu), case)
    difference = float(np.linalg.norm(found - expected) / np.linalg.norm(expected - before))
    return Row(name, case.dtype, difference, TOLERANCE[case.dtype], "three updates")


# ---- memory that the host sees


ROUNDS = 40
BUSY = 1024  # width of the products that keep the GPU busy
ROWS = 4096


def views_row(gpu: mx.Device, spoiled: Callable[[np.ndarray], object] = lambda view: None) -> Row:
    """A thread writes into a buffer through its host view while kernels run on others; then a kernel reads it.

    As a unit is gathered while another is computed. Whole numbers, so sums are the same in any order; the buffers of
    two rounds change places. `spoiled` is called with each view that was written.
    """
    wrong = 0
    with computing_on(gpu):
        buffers = [*empty_rows([(ROWS * 64, "float32")]), *empty_rows([(ROWS * 64, "float32")])]
        busy = mx.random.normal((BUSY, BUSY), key=mx.random.key(0)) / BUSY**0.5
        mx.eval(busy)
        for i in range(ROUNDS):
            buffer = buffers[i % 2]
            view = host_view(buffer)
            values = np.random.default_rng(i).integers(0, 8, view.size).astype(np.float32)
            running = busy
            for _ in range(4):
                running = running @ busy
            mx.async_eval(running)
            thread = threading.Thread(target=np.copyto, args=(view, values))
            thread.start()
            thread.join()
            spoiled(view)
            doubled = buffer * 2
            mx.eval(doubled, running)
            wrong += int((host_view(doubled) != 2 * values).sum()) + int((host_view(buffer) != values).sum())
    return Row(
        "host views beside running kernels", "float32", float(wrong), 0.0, f"elements in {ROUNDS} rounds"
    )
