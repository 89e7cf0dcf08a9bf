"""The loss of micro-batches over the head (`model.head_loss`), evaluated chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_empire.model.distillation import Distillation, likeliest
from mlx_empire.model.head_loss import HeadCall, chunk_ranges, head_chunks, joined_chunks, token_losses


def of_all_rows(by_row: mx.array | np.ndarray) -> float:
    """The loss of a micro-batch from those of its rows (rows,), added in fp32 as within a row."""
    return float(np.array(by_row).sum(dtype=np.float32))


def parts_of_rows(by_row: np.ndarray) -> list[float]:
    """The parts of a micro-batch's loss from those of its rows: (rows,) the loss alone, (rows, 2) the cross-entropy and
    the divergence from a teacher."""
    return [of_all_rows(part) for part in by_row.reshape(len(by_row), -1).T]


# Of some positions: the logits (rows, positions, vocabulary) in float32, targets and mask (rows, positions).
Chunk = tuple[mx.array, mx.array, mx.array]


def logit_chunks(
    head: HeadCall,
    root: Sequence[mx.array],
    hidden: mx.array,
    batch: tuple[mx.array, mx.array, mx.array],
    tokens: int,
) -> Iterator[Chunk]:
    """What evaluations look at, some positions at a time: `batch` is (inputs, targets, mask), each (rows, width)."""
    for a, b in chunk_ranges(hidden.shape[0], hidden.shape[1], tokens):
        inputs, targets, mask = (x[:, a:b] for x in batch)
        yield head(root, hidden[:, a:b], inputs).astype(mx.float32), targets, mask


def head_loss(chunks: Iterable[Chunk], total: mx.array) -> mx.array:
    """Each row's loss (rows,), for evaluation. Evaluates by chunk."""
    loss = mx.array(0.0)
    for wide, targets, mask in chunks:
        weights = (mask / total)[..., None]
        loss = loss + token_losses(wide, mx.softmax(wide, axis=-1), targets[..., None], weights)
        mx.eval(loss)
    return loss


def head_scores(chunks: Iterable[Chunk]) -> mx.array:
    """(rows, 2) float32: each row's sum of its counted targets' log-probabilities, and how many are likeliest.

    Evaluates by chunk.
    """
    scores = mx.array(0.0)
    for logits, targets, mask in chunks:
        losses = nn.losses.cross_entropy(logits, targets)
        likeliest = mx.argmax(logits, axis=-1) == targets
        scores = scores + mx.stack([-(losses * mask).sum(axis=1), (likeliest * mask).sum(axis=1)], axis=1)
        mx.eval(scores)
    return scores


def head_readings(chunks: Iterable[Chunk]) -> mx.array:
    """(rows, width) float32: the log-probability of every target, counted or not. Evaluates by chunk."""
    found = []
    for logits, targets, _ in chunks:
        found.append(-nn.losses.cross_entropy(logits, targets))
        mx.eval(found[-1])
    return mx.concatenate(found, axis=1)


def head_likeliest(
    chunks: Iterable[Chunk], columns: int, top: int, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """Of the targets that count, row by row, what `likeliest` says of a teacher: ids (targets, top) int32 and logs
    (targets, top + 1) float16. `columns`: of the logits that are tokens. Evaluates by chunk."""
    ids, logs, masks = [], [], []
    for logits, _, mask in chunks:
        found = likeliest(logits[..., :columns], top, temperature)
        mx.eval(found)
        ids.append(np.array(found[0]))
        logs.append(np.array(found[1]).astype(np.float16))
        masks.append(np.array(mask) != 0)
    counted = np.concatenate(masks, axis=1)
    return np.concatenate(ids, axis=1)[counted], np.concatenate(logs, axis=1)[counted]


def head_gradients(
    head: HeadCall,
    root: Sequence[mx.array],
    hidden: mx.array,
    batch: Sequence[mx.array],
    total: mx.array,
    tokens: int,
    how: Distillation | None = None,
) -> tuple[mx.array, list[mx.array], mx.array]:
    """Each row's loss, the gradients of their sum by the root's tensors (fp32 sums over chunks) and by `hidden`.

    `hidden` is (rows, width, features), `batch` and `how` as in `head_chunks`. Evaluates by chunk.
    """
    parts: list[mx.array] = []
    loss, sums = mx.zeros(hidden.shape[0]), list[mx.array]()
    for loss, sums, part in head_chunks(head, root, hidden, batch, total, tokens, how):
        mx.eval(loss, sums, part)
        parts.append(part)
    return loss, sums, joined_chunks(parts)
