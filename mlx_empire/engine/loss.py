"""The loss over the head, in chunks of positions, so that logits are never whole.

The loss of a micro-batch is the sum of its counted tokens' cross-entropies (fp32) divided by the *global* count of
counted tokens of the step, so unequal micro-batches and accumulation stay exact. Chunk sizes follow from the model
and the micro-batch's shape alone: they affect bits, memory must not choose them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    The gradient reuses the softmax that the loss is read from, so every logit is exponentiated once and one array of
    their size less is alive: with p the softmax and t the target, the loss is max(logits) - logits[t] - log(max(p)),
    where max(p) is 1 / sum(exp(logits - max)) and never below 1 / vocabulary, and its derivative is p - onehot(t).
    """
    weights, t = (mask / total)[..., None], targets[..., None]

    @mx.custom_function
    def of(wide: mx.array) -> tuple[mx.array, mx.array]:
        p = mx.softmax(wide, axis=-1)
        over = mx.max(wide, axis=-1, keepdims=True) - mx.take_along_axis(wide, t, axis=-1)
        losses = over - mx.log(mx.max(p, axis=-1, keepdims=True))
        hit = mx.take_along_axis(p, t, axis=-1)
        derivative = mx.put_along_axis(p * weights, t, (hit - 1) * weights, axis=-1)
        return (losses * weights).sum(axis=(1, 2)), derivative

    @of.vjp
    def vjp(_: mx.array, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]) -> mx.array:
        return cotangents[0][:, None, None] * outputs[1]

    by_row, _ = cast("tuple[mx.array, mx.array]", of(logits.astype(mx.float32)))
    return by_row


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
        loss = loss + row_losses(head(root, hidden[:, a:b], inputs), targets, mask, total)
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
    *,
    eager: bool,
) -> tuple[mx.array, list[mx.array], mx.array]:
    """Each row's loss, the gradients of their sum by the root's tensors (fp32 sums over chunks) and by `hidden`.

    `hidden` is (rows, width, features), `batch` (inputs, targets, mask), each (rows, width). `eager` evaluates after
    every chunk; otherwise each chunk is made to wait for the one before it, which bounds memory just as well when
    the whole is part of a larger graph (the un-recomputed tail).
    """

    def chunk(arrays: Sequence[mx.array], part: mx.array, *rest: mx.array) -> tuple[mx.array, mx.array]:
        inputs, targets, mask = rest
        by_row = row_losses(head(arrays, part, inputs), targets, mask, total)
        return by_row.sum(), by_row

    loss_and_gradients = mx.value_and_grad(chunk, argnums=(0, 1))
    ranges = chunk_ranges(hidden.shape[0], hidden.shape[1], tokens)
    loss: mx.array | None = None
    sums: list[mx.array] = []
    parts: list[mx.array] = []
    for a, b in ranges:
        part = hidden[:, a:b]
        if loss is not None and not eager:
            part = mx.depends([part], [loss, *sums, parts[-1]])[0]
        (_, value), (gradients, part_gradient) = loss_and_gradients(
            list(root), part, *(x[:, a:b] for x in batch)
        )
        if loss is None:
            loss, sums = value, list(gradients)
        else:
            loss = loss + value
            sums = [s.astype(mx.float32) + g.astype(mx.float32) for s, g in zip(sums, gradients, strict=True)]
        del gradients
        parts.append(part_gradient)
        if eager:
            mx.eval(loss, sums, part_gradient)
    assert loss is not None
    return loss, sums, parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
