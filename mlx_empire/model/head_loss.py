"""The differentiated loss over the head, in chunks of positions, so that logits are never whole.

The loss of a micro-batch is the sum of its counted tokens' cross-entropies (fp32) divided by the *global* count of
counted tokens of the step, so unequal micro-batches and accumulation stay exact. Chunk sizes follow from the model
and the micro-batch's shape alone: they affect bits, memory must not choose them.

The engine evaluates it and the plan traces it (`layer_passes`), so it stands below both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

from mlx_empire.model.distillation import Distillation, divergences

HeadCall = Callable[[Sequence[mx.array], mx.array, mx.array], mx.array]


def chunk_ranges(rows: int, width: int, tokens: int) -> list[tuple[int, int]]:
    """Ranges of positions so that rows x positions stays at or below `tokens` (at least one position each)."""
    positions = max(tokens // rows, 1)
    return [(a, min(a + positions, width)) for a in range(0, width, positions)]


def row_losses(
    logits: mx.array,
    targets: mx.array,
    mask: mx.array,
    total: mx.array,
    taught: tuple[Distillation, mx.array, mx.array] | None = None,
) -> tuple[mx.array, mx.array]:
    """(rows,): sum(cross entropy x mask) / total of each; and what to differentiate, whose value means nothing.

    Logits (rows, positions, vocabulary) are taken to fp32. The derivative p - onehot(t), with p the softmax and t the
    target, is computed together with the loss from one softmax. So every logit is exponentiated once and one array of
    their size less is alive. It stands as a constant in sum(logits x derivative), which nobody evaluates.

    `taught`: how a teacher's values count, and these, `ids` and `logs` as in `divergences`. Then of each row there are
    the cross-entropy and the divergence, neither weighted, (rows, 2), and the derivative is that of the mixed loss.
    """
    wide = logits.astype(mx.float32)
    constant, weights, t = mx.stop_gradient(wide), (mask / total)[..., None], targets[..., None]
    p = mx.softmax(constant, axis=-1)
    hit = mx.take_along_axis(p, t, axis=-1)
    derivative = mx.put_along_axis(p * weights, t, (hit - 1) * weights, axis=-1)
    by_row = token_losses(constant, p, t, weights)
    if taught is not None:
        how, ids, logs = taught
        found, towards = divergences(constant, ids, logs, how.temperature)
        by_row = mx.stack([by_row, (found * weights[..., 0]).sum(axis=1)], axis=1)
        # By the logits, T times nearer than the scaled ones, T^2 becomes T.
        derivative = (1 - how.weight) * derivative + (how.weight * how.temperature) * (towards * weights)
    return by_row, (wide * derivative).sum(axis=(1, 2))


def token_losses(wide: mx.array, p: mx.array, t: mx.array, weights: mx.array) -> mx.array:
    """By row max(logits) - logits[t] - log(max(p)), weighted; max(p) = 1 / sum(exp(logits - max)) >= 1 / vocabulary."""
    over = mx.max(wide, axis=-1, keepdims=True) - mx.take_along_axis(wide, t, axis=-1)
    losses = over - mx.log(mx.max(p, axis=-1, keepdims=True))
    return (losses * weights).sum(axis=(1, 2))


def head_chunks(
    head: HeadCall,
    root: Sequence[mx.array],
    hidden: mx.array,
    batch: Sequence[mx.array],
    total: mx.array,
    tokens: int,
    how: Distillation | None = None,
) -> Iterator[tuple[mx.array, list[mx.array], mx.array]]:
    """By chunk: the rows' losses so far, the root's gradients so far, the gradient by the chunk of `hidden`. All lazy.

    `hidden` is (rows, width, features), `batch` (inputs, targets, mask), each (rows, width), and where there is a `how`
    a teacher's `ids` and `logs` besides (`divergences`). Whoever evaluates each chunk before the next one holds one
    chunk's logits at a time.
    """

    def chunk(arrays: Sequence[mx.array], part: mx.array, *rest: mx.array) -> tuple[mx.array, mx.array]:
        inputs, targets, mask, *teacher = rest
        taught = None if how is None else (how, teacher[0], teacher[1])
        by_row, surrogate = row_losses(head(arrays, part, inputs), targets, mask, total, taught)
        return surrogate.sum(), by_row

    loss_and_gradients = mx.value_and_grad(chunk, argnums=(0, 1))
    loss: mx.array | None = None
    sums: list[mx.array] = []
    for a, b in chunk_ranges(hidden.shape[0], hidden.shape[1], tokens):
        (surrogate, value), (gradients, part) = loss_and_gradients(
            list(root), hidden[:, a:b], *(x[:, a:b] for x in batch)
        )
        if loss is None:
            loss, sums = value, list(gradients)
        else:
            loss = loss + value
            sums = [s.astype(mx.float32) + g.astype(mx.float32) for s, g in zip(sums, gradients, strict=True)]
        del surrogate, value, gradients  # whoever holds the first holds the logits
        yield loss, sums, part


def joined_chunks(parts: Sequence[mx.array]) -> mx.array:
    """The gradient by the whole `hidden` of those by its chunks."""
    return parts[0] if len(parts) == 1 else mx.concatenate(list(parts), axis=1)
