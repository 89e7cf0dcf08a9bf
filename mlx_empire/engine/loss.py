"""The loss over the head, in chunks of positions, so that logits are never whole.

The loss of a micro-batch is the sum of its counted tokens' cross-entropies (fp32) divided by the *global* count of
counted tokens of the step, so unequal micro-batches and accumulation stay exact. Chunk sizes follow from the model
and the micro-batch's shape alone: they affect bits, memory must not choose them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

HeadCall = Callable[[Sequence[mx.array], mx.array, mx.array], mx.array]


def chunk_ranges(rows: int, width: int, tokens: int) -> list[tuple[int, int]]:
    """Ranges of positions so that rows x positions stays at or below `tokens` (at least one position each)."""
    positions = max(tokens // rows, 1)
    return [(a, min(a + positions, width)) for a in range(0, width, positions)]


def row_losses(logits: mx.array, targets: mx.array, mask: mx.array, total: mx.array) -> mx.array:
    """(rows,): sum(cross entropy x mask) / total of each; logits (rows, positions, vocabulary) are taken to fp32.

    To be differentiated: the derivative p - onehot(t), with p the softmax and t the target, is computed together with
    the loss from one softmax. So every logit is exponentiated once and one array of their size less is alive.
    """
    weights, t = (mask / total)[..., None], targets[..., None]

    @mx.custom_function
    def of(wide: mx.array) -> tuple[mx.array, mx.array]:
        p = mx.softmax(wide, axis=-1)
        hit = mx.take_along_axis(p, t, axis=-1)
        derivative = mx.put_along_axis(p * weights, t, (hit - 1) * weights, axis=-1)
        return _losses(wide, p, t, weights), derivative

    @of.vjp
    def vjp(_: mx.array, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]) -> mx.array:
        return cotangents[0][:, None, None] * outputs[1]

    by_row, _ = cast("tuple[mx.array, mx.array]", of(logits.astype(mx.float32)))
    return by_row


def _losses(wide: mx.array, p: mx.array, t: mx.array, weights: mx.array) -> mx.array:
    """By row max(logits) - logits[t] - log(max(p)), weighted; max(p) = 1 / sum(exp(logits - max)) >= 1 / vocabulary."""
    over = mx.max(wide, axis=-1, keepdims=True) - mx.take_along_axis(wide, t, axis=-1)
    losses = over - mx.log(mx.max(p, axis=-1, keepdims=True))
    return (losses * weights).sum(axis=(1, 2))


def of_all_rows(by_row: mx.array | np.ndarray) -> float:
    """The loss of a micro-batch from those of its rows, added in fp32 as within a row."""
    return float(np.array(by_row).sum(dtype=np.float32))


def head_loss(
    head: HeadCall,
    root: Sequence[mx.array],
    hidden: mx.array,
    batch: tuple[mx.array, mx.array, mx.array],
    total: mx.array,
    tokens: int,
) -> mx.array:
    """Each row's loss, for evaluation: `batch` is (inputs, targets, mask), each (rows, width). Evaluates by chunk."""
    loss = mx.zeros(hidden.shape[0])
    for a, b in chunk_ranges(hidden.shape[0], hidden.shape[1], tokens):
        inputs, targets, mask = (x[:, a:b] for x in batch)
        wide = head(root, hidden[:, a:b], inputs).astype(mx.float32)
        weights = (mask / total)[..., None]
        loss = loss + _losses(wide, mx.softmax(wide, axis=-1), targets[..., None], weights)
        mx.eval(loss)
    return loss


def head_scores(
    head: HeadCall,
    root: Sequence[mx.array],
    hidden: mx.array,
    batch: tuple[mx.array, mx.array, mx.array],
    tokens: int,
) -> mx.array:
    """(rows, 2) float32: each row's sum of its counted targets' log-probabilities, and how many are likeliest.

    Arguments as `head_loss` has them. Evaluates by chunk.
    """
    scores = mx.zeros((hidden.shape[0], 2))
    for a, b in chunk_ranges(hidden.shape[0], hidden.shape[1], tokens):
        inputs, targets, mask = (x[:, a:b] for x in batch)
        logits = head(root, hidden[:, a:b], inputs).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, targets)
        likeliest = mx.argmax(logits, axis=-1) == targets
        scores = scores + mx.stack([-(losses * mask).sum(axis=1), (likeliest * mask).sum(axis=1)], axis=1)
        mx.eval(scores)
    return scores


def head_gradients(
    head: HeadCall,
    root: Sequence[mx.array],
    hidden: mx.array,
    batch: tuple[mx.array, mx.array, mx.array],
    total: mx.array,
    tokens: int,
) -> tuple[mx.array, list[mx.array], mx.array]:
    """Each row's loss, the gradients of their sum by the root's tensors (fp32 sums over chunks) and by `hidden`.

    `hidden` is (rows, width, features), `batch` (inputs, targets, mask), each (rows, width). Evaluates by chunk.
    """
    parts: list[mx.array] = []
    loss, sums = mx.zeros(hidden.shape[0]), list[mx.array]()
    for loss, sums, part in head_chunks(head, root, hidden, batch, total, tokens):
        mx.eval(loss, sums, part)
        parts.append(part)
    return loss, sums, joined_chunks(parts)


def head_chunks(
    head: HeadCall,
    root: Sequence[mx.array],
    hidden: mx.array,
    batch: tuple[mx.array, mx.array, mx.array],
    total: mx.array,
    tokens: int,
) -> Iterator[tuple[mx.array, list[mx.array], mx.array]]:
    """By chunk: the rows' losses so far, the root's gradients so far, the gradient by the chunk of `hidden`. All lazy.

    Whoever evaluates each chunk before the next one holds one chunk's logits at a time. Arguments as above.
    """

    def chunk(arrays: Sequence[mx.array], part: mx.array, *rest: mx.array) -> tuple[mx.array, mx.array]:
        inputs, targets, mask = rest
        by_row = row_losses(head(arrays, part, inputs), targets, mask, total)
        return by_row.sum(), by_row

    loss_and_gradients = mx.value_and_grad(chunk, argnums=(0, 1))
    loss: mx.array | None = None
    sums: list[mx.array] = []
    for a, b in chunk_ranges(hidden.shape[0], hidden.shape[1], tokens):
        (_, value), (gradients, part) = loss_and_gradients(
            list(root), hidden[:, a:b], *(x[:, a:b] for x in batch)
        )
        if loss is None:
            loss, sums = value, list(gradients)
        else:
            loss = loss + value
            sums = [s.astype(mx.float32) + g.astype(mx.float32) for s, g in zip(sums, gradients, strict=True)]
        del value, gradients
        yield loss, sums, part


def joined_chunks(parts: Sequence[mx.array]) -> mx.array:
    """The gradient by the whole `hidden` of those by its chunks."""
    return parts[0] if len(parts) == 1 else mx.concatenate(list(parts), axis=1)
