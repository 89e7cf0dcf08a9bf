"""Can this model be streamed? Asked of the real model, and shown by the model scaled down, before training.

The probe evaluates no layer. A layer may depend on the rest of the model by its hidden state alone. So what the model
passes to its layers besides (masks) must not change when the slots return something else, nor when the tokens change:
otherwise layers share more than the hidden state (shared keys and values, per-layer inputs), gradients would get
lost, and the model is refused.

The proof is mlx-lm's model of the same family and pattern of layers with small numbers, streamed against its own
whole-model gradients, so it takes a second and no memory even for a model that no machine holds. If loss or any
gradient differs, the model is refused. On a GPU its heads have sizes for which attention is fused where the real
model's have, and its rows are long enough for that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_empire.cluster.machine import computes_on_gpu
from mlx_empire.comm.buffers import host_view
from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.data.batches import MicroBatch
from mlx_empire.engine.gradients import GradientStore
from mlx_empire.engine.loss import of_all_rows
from mlx_empire.engine.packing_proof import verify_packing
from mlx_empire.engine.passes import Passes
from mlx_empire.engine.step import StreamedStep
from mlx_empire.engine.store import ShardStore
from mlx_empire.errors import UserError
from mlx_empire.model.attention.fused import FUSED_HEAD_DIMS
from mlx_empire.model.attention.segments import Kernels
from mlx_empire.model.build import build_model, describe, foreign
from mlx_empire.model.kept import ATTENTION
from mlx_empire.model.layers import LayerArguments, SlottedModel, refuse_sharing, separable
from mlx_empire.model.quantize import unpacked
from mlx_empire.model.scaled_down import VOCABULARY, first_layers, scaled_down_config
from mlx_empire.model.spec import RootNames, base_name
from mlx_empire.plan.actions import Stash, StepShape
from mlx_empire.plan.shards import make_plan
from mlx_empire.plan.workload import CellLayout, chunk_tokens

WIDTH = 8


@dataclass(frozen=True)
class RootUse:
    """Positions among the root's trainable tensors that head and embedding depend on, and what packing needs.

    `table`: the one in which tokens are looked up, where it is enough to have its rows; None where it is not.
    """

    head: tuple[int, ...]
    embed: tuple[int, ...]
    table: int | None
    absolute_positions: bool
    separable: bool


def probe_root(slotted: SlottedModel, store: ShardStore, vocabulary: int, rows: int = 1) -> RootUse:
    """Check that layers are tied by the hidden state alone (UserError if not) and find out how the root is used.

    A tensor's use is found by binding NaN in its place and looking whether NaN comes out. `rows` of tokens are looked
    at, as many as there are daughters whose adapters stand together.
    """
    root = store.bind(0)
    tokens = mx.repeat((mx.arange(WIDTH) % vocabulary)[None], rows, axis=0)
    hidden, arguments = slotted.capture(tokens)
    noise = [0.5 * (i + 1) for i in range(len(slotted.layers))]
    _, disturbed = slotted.capture(tokens, noise)
    _, others = slotted.capture((tokens * 7 + 3) % vocabulary)
    if not (_same(arguments, disturbed) and _same(arguments, others)):
        raise refuse_sharing(slotted.name)
    boundary = mx.random.normal(hidden.shape, key=mx.random.key(0)).astype(hidden.dtype)
    head, embed = [], []
    for i, tensor in enumerate(root):
        poisoned = list(root)
        poisoned[i] = mx.broadcast_to(mx.array(mx.nan, tensor.dtype), tensor.shape)
        store.rebind(0, poisoned)
        if _has_nan(slotted.head(tokens, boundary)):
            head.append(i)
        if _has_nan(slotted.embed(tokens)):
            embed.append(i)
    store.rebind(0, root)
    table = _looked_up(slotted, store, embed, vocabulary, rows)
    repeated = slotted.embed(mx.zeros((rows, WIDTH), mx.int32))
    absolute = not bool(mx.array_equal(repeated[:, 0], repeated[:, -1]).item())
    store.free(0)
    apart = all(
        separable(layer, given, WIDTH) for layer, given in zip(slotted.layers, arguments, strict=True)
    )
    return RootUse(tuple(head), tuple(embed), table, absolute, apart)


def _looked_up(
    slotted: SlottedModel, store: ShardStore, embed: Iterable[int], vocabulary: int, count: int
) -> int | None:
    """The position of the root's tensor that gives the same embedding when only the tokens' rows of it are there, and
    tokens are counted anew; None if there is none, for instance where a frozen table is looked up beside it.
    """
    root = store.bound(0)
    tokens = np.array([[vocabulary - 1 - i for i in range(min(WIDTH, vocabulary))]] * count)
    rows, places = np.unique(tokens, return_inverse=True)
    expected = slotted.embed(mx.array(tokens))
    for i in embed:
        if len(root[i].shape) == 2 and root[i].shape[0] >= vocabulary > WIDTH:
            fewer = list(root)
            fewer[i] = root[i][mx.array(rows)]
            store.rebind(0, fewer)
            same = bool(
                mx.array_equal(slotted.embed(mx.array(places.reshape(tokens.shape))), expected).item()
            )
            store.rebind(0, root)
            if same:
                return i
    return None


def check_packing(slotted: SlottedModel, use: RootUse) -> None:
    """UserError where packed documents could not be kept apart."""
    if use.absolute_positions:
        raise UserError(f"data.packing: true: {slotted.name} has absolute positions; set data.packing: false")
    if not use.separable:
        raise UserError(
            f"data.packing: true: {slotted.name} has layers without a mask; set data.packing: false"
        )


def _same(first: Iterable[LayerArguments], second: Iterable[LayerArguments]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(_equal((a.positional, a.keywords), (b.positional, b.keywords)) for a, b in pairs)


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, mx.array) or isinstance(second, mx.array):
        both = isinstance(first, mx.array) and isinstance(second, mx.array)
        return (
            both
            and first.shape == second.shape
            and bool(mx.array_equal(first, second, equal_nan=True).item())
        )
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(_equal(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, dict):
        a, b = dict(tree_flatten(first)), dict(tree_flatten(second))
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return bool(first is second or first == second)


def _has_nan(array: mx.array) -> bool:
    return bool(mx.any(mx.isnan(array)).item())


TOLERANCE = 1e-4
GPU_TOLERANCE = 2e-3  # GPUs multiply float32 with fewer bits: TF32 is the default on some
EVERY = (ATTENTION, *range(1000))  # products of a layer, and more
MOST_PARAMETERS = 1 << 27
FEW_LAYERS = 4  # of a model that is larger than that with all that it is scaled down to
NOISE = 1e-3  # of the largest gradient: smaller ones, in good part rounding, are compared with that


def verify_scaled_down(
    config: Mapping[str, Any],
    name: str,
    *,
    by_pattern: bool = False,
    keeps: bool = False,
    compiles: bool = False,
    packs: bool = False,
) -> RootNames:
    """Train-step it both ways in fp32 and compare; UserError naming what differs, or that it cannot be built.

    `by_pattern`: streamed layers attend in blocks, though rows are short, and those of the whole model by their masks;
    `keeps`: of streamed layers everything is kept that can be; `compiles`: they run by traces; `packs`: packed rows
    must not see each other's documents either.

    Returns which parameters of the root its head and embedding depend on, and how: the model's own, by their names.
    """
    on_gpu = computes_on_gpu()
    mx.random.seed(0)
    small, model = _small_model(config, name, FUSED_HEAD_DIMS if on_gpu else ())
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    batch = _batch()
    with foreign(f"{name}: mlx-lm's model cannot be differentiated here"):
        loss, gradients = _whole(model, batch)
    with foreign(f"{name}: mlx-lm's model cannot be run layer by layer", mixed=True):
        streamed_loss, streamed, root = _streamed(model, small, name, batch, by_pattern, keeps, compiles)
    worst, where = abs(loss - streamed_loss) / max(abs(loss), 1e-9), "the loss"
    floor = max(NOISE * max(float(np.abs(g).max()) for g in gradients.values()), 1e-6)
    for path, expected in gradients.items():
        scale = max(float(np.abs(expected).max()), floor)
        difference = float(np.abs(streamed[path] - expected.reshape(-1)).max()) / scale
        if not difference <= worst:
            worst, where = difference, path
    tolerance = GPU_TOLERANCE if on_gpu else TOLERANCE
    if not worst <= tolerance:
        raise UserError(
            f"{name}: streamed and whole-model gradients differ at {where} by {worst:.1e} (relative); "
            "this architecture would be trained wrongly, so it is refused"
        )
    if packs:
        _, another = _small_model(config, name, FUSED_HEAD_DIMS if on_gpu else ())
        another.set_dtype(mx.float32)
        verify_packing(another.eval(), name, VOCABULARY, tolerance)
    return root


def _small_model(
    config: Mapping[str, Any], name: str, fused: Collection[int]
) -> tuple[dict[str, Any], nn.Module]:
    """The scaled-down configuration and its model, lazily; of a model that stays wide (Falcon 7B has 71 heads, which
    nothing divides) the first layers alone. UserError where even these are too large.
    """
    whole = scaled_down_config(config, fused=fused)
    whole = unpacked(whole)  # how weights are stored is not what the layers do with them
    for small in (whole, first_layers(whole, FEW_LAYERS)):
        model = build_model(small, f"{name} (scaled down to verify streaming)")
        parameters = sum(array.size for _, array in tree_flatten(model.parameters()))
        if parameters <= MOST_PARAMETERS:
            return small, model
    raise UserError(
        f"{name}: streaming is verified on a scaled-down model, and this one cannot be scaled down: it keeps "
        f"{parameters:,} parameters; config.json may lack sizes"
    )


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
    model: nn.Module,
    config: Mapping[str, Any],
    name: str,
    batch: MicroBatch,
    by_pattern: bool,
    keeps: bool,
    compiles: bool,
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
        kernels = replace(Kernels.here(), short=0) if by_pattern else None
        tokens = chunk_tokens(VOCABULARY)
        passes = Passes(
            slotted, store, use.head, use.embed, tokens, table=use.table, kernels=kernels, compiles=compiles
        )
        shape = StepShape(3, plan.trained, (1,))
        if keeps:
            stash = Stash(tuple((u, EVERY) for u in range(1, shape.layers + 1)), shape.layers)
            shape = replace(shape, stash=stash)
        step = StreamedStep(passes, store, sums, shape)
        (rows,) = step.gradients([[batch]], int(batch.mask.sum()))
    finally:
        thread.close()
    flat = {
        path: host_view(sums.totals[u][s])[p.start : p.start + p.tensor.size]
        for path, (u, s, p) in plan.tensors.items()
    }
    names = [base_name(placement.tensor.name) for _, placement in store.trainable(0)]
    head, embed = (tuple(names[i] for i in used) for used in (use.head, use.embed))
    return of_all_rows(rows), flat, RootNames(head, embed, None if use.table is None else names[use.table])
