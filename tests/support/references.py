"""What a step must give: MLX's own losses, and gradients of the whole model at once."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_empire.data.batches import MicroBatch
from mlx_empire.model.head_loss import row_losses
from mlx_empire.plan.workload import cell_layout
from support.stepping import TAUGHT, Case, batches_of, counted_tokens, weights_of

RowLosses = Callable[..., mx.array]  # of logits, targets, mask and total, and of a teacher's values


def stock_losses(
    logits: mx.array, targets: mx.array, mask: mx.array, total: mx.array, *teacher: mx.array
) -> mx.array:
    """What `row_losses` must give, by MLX's own cross entropy, and differentiated by MLX."""
    wide = logits.astype(mx.float32)
    losses = nn.losses.cross_entropy(wide, targets)
    if teacher:
        ids, logs = teacher
        q = mx.softmax(wide / TAUGHT.temperature, axis=-1)
        known = mx.take_along_axis(q, ids, axis=-1)
        q = mx.concatenate(
            [known, q.sum(axis=-1, keepdims=True) - known.sum(axis=-1, keepdims=True)], axis=-1
        )
        p = mx.softmax(logs.astype(mx.float32), axis=-1)
        divergence = nn.losses.kl_div_loss(mx.log(q), mx.log(p), axis=-1)
        losses = (1 - TAUGHT.weight) * losses + TAUGHT.weight * TAUGHT.temperature**2 * divergence
    return (losses * mask).sum(axis=1) / total


def our_losses(
    logits: mx.array, targets: mx.array, mask: mx.array, total: mx.array, *teacher: mx.array
) -> mx.array:
    """`row_losses` as one function with value and gradient: what is differentiated has the value 0 here."""
    by_row, surrogate = row_losses(logits, targets, mask, total, (TAUGHT, *teacher) if teacher else None)
    if teacher:
        by_row = TAUGHT.mixed(by_row[:, 0], by_row[:, 1])
    return mx.stop_gradient(by_row) + (surrogate - mx.stop_gradient(surrogate))


def reference_loss(
    model: nn.Module, batch: MicroBatch, total: int, by_row: RowLosses = stock_losses
) -> mx.array:
    """Sum of masked cross-entropies over the global count, on whole logits; packed rows one document at a time."""
    count, teacher = mx.array(float(total)), () if batch.teacher is None else batch.teacher()
    if batch.documents is None:
        targets, mask, *taught = map(mx.array, (batch.targets, batch.mask, *teacher))
        return by_row(model(mx.array(batch.inputs)), targets, mask, count, *taught).sum()
    loss = mx.array(0.0)
    for row in range(batch.inputs.shape[0]):
        for document in np.unique(batch.documents[row]):
            (place,) = np.nonzero(batch.documents[row] == document)
            inputs, targets, mask, *taught = (
                mx.array(part[row][place])[None]
                for part in (batch.inputs, batch.targets, batch.mask, *teacher)
            )
            loss = loss + by_row(model(inputs), targets, mask, count, *taught).sum()
    return loss


def reference_gradients(
    case: Case,
    world_size: int,
    values: dict[str, mx.array] | None = None,
    step: int = 0,
    by_row: RowLosses = stock_losses,
) -> tuple[float, dict[str, np.ndarray]]:
    """(mean loss, flat fp32 gradients by name) by the whole model, added in cell order."""
    model, spec, initial = weights_of(case)
    model.load_weights(list((values or initial).items()))
    table = model.model.embed_tokens.weight if case.tied or case.family == "gemma2" else None
    if table is not None:
        model.model.embed_tokens = _TwoTables(table)
    batches = batches_of(case, step)
    total = counted_tokens(batches)
    layout = cell_layout(case.micro_batches * case.rows, case.rows, case.cells, world_size)
    gradient = nn.value_and_grad(model, reference_loss)
    losses, sums = [], None
    for cell in range(layout.cells):
        cell_sum = None
        for j in layout.members(cell):
            loss, grads = gradient(model, batches[j], total, by_row)
            flat = dict(tree_flatten(grads))
            mx.eval(loss, flat)
            losses.append(loss.item())
            cell_sum = flat if cell_sum is None else {k: cell_sum[k] + flat[k] for k in flat}
            mx.eval(cell_sum)
        assert cell_sum is not None
        if table is not None:
            head = cell_sum.pop("model.embed_tokens.head")
            cell_sum["model.embed_tokens.weight"] = head + cell_sum["model.embed_tokens.weight"]
        sums = cell_sum if sums is None else {k: sums[k] + cell_sum[k] for k in sums}
        mx.eval(sums)
    assert sums is not None
    names = {t.name for u in spec.units for t in u.tensors}
    return sum(losses), {k: np.array(v).reshape(-1) for k, v in sums.items() if k in names}


class _TwoTables(nn.Module):
    """An embedding whose use as a head has a matrix of its own, so that both gradients can be told apart."""

    def __init__(self, table: mx.array) -> None:
        super().__init__()
        self.weight, self.head = table, table

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.weight[tokens]

    def as_linear(self, x: mx.array) -> mx.array:
        return x @ self.head.T
