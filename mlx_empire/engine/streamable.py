"""The proof before training: the model scaled down and streamed, against its own whole-model gradients.

It is mlx-lm's model of the same family and pattern of layers with small numbers, so the check takes a second
and no memory even for a model that no machine holds. If loss or any gradient differs, the model is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.comm.views import host_view
from mlx_empire.data.batches import MicroBatch
from mlx_empire.engine.gradients import GradientStore
from mlx_empire.engine.loss import of_all_rows
from mlx_empire.engine.passes import Passes
from mlx_empire.engine.probe import probe_root
from mlx_empire.engine.slots import SlottedModel
from mlx_empire.engine.step import StreamedStep
from mlx_empire.engine.store import ShardStore
from mlx_empire.errors import UserError
from mlx_empire.model.build import build_model, describe
from mlx_empire.model.foreign import foreign
from mlx_empire.model.quantize import unpacked
from mlx_empire.model.scaled_down import VOCABULARY, scaled_down_config
from mlx_empire.model.spec import RootNames, base_name
from mlx_empire.plan.cells import CellLayout
from mlx_empire.plan.schedule import StepShape
from mlx_empire.plan.shards import make_plan
from mlx_empire.plan.workload import chunk_tokens

TOLERANCE = 1e-4
MOST_PARAMETERS = 1 << 27
NOISE = 1e-3  # of the largest gradient: smaller ones, in good part rounding, are compared with that


def verify_scaled_down(config: Mapping[str, Any], name: str) -> RootNames:
    """Train-step it both ways in fp32 and compare; UserError naming what differs, or that it cannot be built.

    Returns which parameters of the root its head and embedding depend on: the model's own, by their names.
    """
    small = scaled_down_config(config)
    small = unpacked(small)  # how weights are stored is not what the layers do with them
    mx.random.seed(0)
    model = build_model(small, f"{name} (scaled down to verify streaming)")
    parameters = sum(array.size for _, array in tree_flatten(model.parameters()))
    if parameters > MOST_PARAMETERS:
        raise UserError(
            f"{name}: streaming is verified on a scaled-down model, and this one cannot be scaled down: it keeps "
            f"{parameters:,} parameters; config.json may lack sizes"
        )
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    batch = _batch()
    with foreign(f"{name}: mlx-lm's model cannot be differentiated here"):
        loss, gradients = _whole(model, batch)
    with foreign(f"{name}: mlx-lm's model cannot be run layer by layer", mixed=True):
        streamed_loss, streamed, root = _streamed(model, small, name, batch)
    worst, where = abs(loss - streamed_loss) / max(abs(loss), 1e-9), "the loss"
    floor = max(NOISE * max(float(np.abs(g).max()) for g in gradients.values()), 1e-6)
    for path, expected in gradients.items():
        scale = max(float(np.abs(expected).max()), floor)
        difference = float(np.abs(streamed[path] - expected.reshape(-1)).max()) / scale
        if not difference <= worst:
            worst, where = difference, path
    if not worst <= TOLERANCE:
        raise UserError(
            f"{name}: streamed and whole-model gradients differ at {where} by {worst:.1e} (relative); "
            "this architecture would be trained wrongly, so it is refused"
        )
    return root


def _batch() -> MicroBatch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, (2, 49)).astype(np.int32)
    mask = np.ones((2, 48), np.float32)
    mask[0, :7] = 0
    return MicroBatch(tokens[:, :-1], tokens[:, 1:], mask, None, (0, 1))


def _whole(model: nn.Module, batch: MicroBatch) -> tuple[float, dict[str, np.ndarray]]:
    inputs, targets, mask = (mx.array(x) for x in (batch.inputs, batch.targets, batch.mask))

    def mean_loss(module: nn.Module) -> mx.array:
        losses = nn.losses.cross_entropy(module(inputs).astype(mx.float32), targets)
        mean: mx.array = (losses * mask).sum() / mask.sum()
        return mean

    loss, gradients = nn.value_and_grad(model, mean_loss)(model)
    mx.eval(loss, gradients)
    return float(loss.item()), {path: np.array(g) for path, g in tree_flatten(gradients)}


def _streamed(
    model: nn.Module, config: Mapping[str, Any], name: str, batch: MicroBatch
) -> tuple[float, dict[str, np.ndarray], RootNames]:
    weights = dict(tree_flatten(model.parameters()))
    spec = describe(model, config, name, "float32")
    plan = make_plan(spec.units, [1.0], 3)
    comm, thread = SoloCommunicator("scaled-down"), CommThread()
    try:
        store = ShardStore(plan, model, comm, thread)
        for index, unit in enumerate(spec.units):
            store.load(index, ((t, weights[t.name]) for t in unit.tensors))
        slotted = SlottedModel(model, name)
        use = probe_root(slotted, store, VOCABULARY)
        layout = CellLayout(1, 1, 1)
        sums = GradientStore(store, comm, thread, layout, "float32")
        passes = Passes(slotted, store, use.head, use.embed, chunk_tokens(VOCABULARY))
        step = StreamedStep(passes, store, sums, StepShape(3, plan.trained, (1,)))
        (rows,) = step.gradients([[batch]], int(batch.mask.sum()))
    finally:
        thread.close()
    flat = {
        path: host_view(sums.totals[u][s])[p.start : p.start + p.tensor.size]
        for path, (u, s, p) in plan.tensors.items()
    }
    names = [base_name(placement.tensor.name) for _, placement in store.trainable(0)]
    head, embed = (tuple(names[i] for i in used) for used in (use.head, use.embed))
    return of_all_rows(rows), flat, RootNames(head, embed)
