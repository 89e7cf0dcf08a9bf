"""What a student learns from a teacher's likeliest tokens, and how its loss mixes with the cross-entropy.

Of every counted target the teacher gives its `top` likeliest tokens K and its probabilities p of them at temperature T,
softmax(logits / T) over its whole vocabulary; all other tokens are *one event more*, of probability p_rest = 1 - sum p.
With q the student's softmax(logits / T) and q_rest = sum of q outside K:

    loss = (1 - weight) x cross-entropy + weight x T^2 x D
    D    = sum over K of p log(p / q)  +  p_rest log(p_rest / q_rest)

T^2 keeps the gradient's size alike at any temperature (Hinton, Vinyals, Dean: Distilling the knowledge in a neural
network, arXiv:1503.02531, section 2). D is the forward Kullback-Leibler divergence of the two distributions with the
tail put together: never above that of the whole ones (the log sum inequality; Cover and Thomas, Elements of information
theory, theorem 2.7.1), zero where they agree, and it leaves how the student shares out the tail alone. A tail that is
cut off and p renormalised over K would teach the student that all else never happens.

    dD / d(logits / T) = q - p in K,  and  q (1 - p_rest / q_rest)  outside
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

ID_BYTES, LOG_BYTES = 4, 2  # of a token and of a logarithm, as they are kept and as a step has them
TINY = 1e-30  # what a probability is taken to be at least, under a logarithm or a fraction


@dataclass(frozen=True)
class Distillation:
    """`weight` of the divergence in the loss, from above 0 to 1; `temperature` of both distributions; `top`: how many
    tokens of the teacher's are known one by one."""

    weight: float
    temperature: float
    top: int

    def mixed(self, cross_entropy: float, divergence: float) -> float:
        """The loss of its two parts."""
        return (1 - self.weight) * cross_entropy + self.weight * self.temperature**2 * divergence


def bytes_per_target(top: int) -> int:
    """What a teacher's values of a target take."""
    return ID_BYTES * top + LOG_BYTES * (top + 1)


def divergences(
    wide: mx.array, ids: mx.array, logs: mx.array, temperature: float
) -> tuple[mx.array, mx.array]:
    """D at each position (rows, positions), and its derivative by `wide` / temperature, of `wide`'s shape; float32.

    `wide`: logits (rows, positions, vocabulary) float32. `ids`: (rows, positions, top) int32, different ones at each
    position. `logs`: (rows, positions, top + 1), logarithms of p and last of p_rest in any float; rounded as they are,
    they are made to sum to one. Nothing here is differentiated.
    """
    scaled = wide / temperature
    q = mx.softmax(scaled, axis=-1)
    p = mx.softmax(logs.astype(mx.float32), axis=-1)
    known, rest = p[..., :-1], p[..., -1:]
    # log q = logit - max - log(sum of exp), and max(q) is 1 / sum of exp(logit - max).
    over = mx.take_along_axis(scaled, ids, axis=-1) - mx.max(scaled, axis=-1, keepdims=True)
    log_known = over + mx.log(mx.max(q, axis=-1, keepdims=True))
    # The tail is added up, for 1 - sum(q) would lose what is small.
    tail = mx.put_along_axis(q, ids, mx.array(0.0), axis=-1)
    q_rest = mx.maximum(tail.sum(axis=-1, keepdims=True), TINY)
    found = (_times_log(known) - known * log_known).sum(axis=-1)
    found = found + (_times_log(rest) - rest * mx.log(q_rest))[..., 0]
    derivative = mx.put_along_axis(tail * (1 - rest / q_rest), ids, mx.exp(log_known) - known, axis=-1)
    return found, derivative


def likeliest(wide: mx.array, top: int, temperature: float) -> tuple[mx.array, mx.array]:
    """What `divergences` wants of a teacher: `ids` (rows, positions, top) int32, likeliest first, and `logs` (rows,
    positions, top + 1) float32, of its logits `wide` (rows, positions, vocabulary above `top`) float32."""
    scaled = wide / temperature
    ids = mx.argpartition(scaled, kth=-top, axis=-1)[..., -top:]
    ids = mx.take_along_axis(ids, mx.argsort(-mx.take_along_axis(scaled, ids, axis=-1), axis=-1), axis=-1)
    logs = mx.take_along_axis(scaled, ids, axis=-1) - mx.logsumexp(scaled, axis=-1, keepdims=True)
    tail = mx.put_along_axis(mx.softmax(scaled, axis=-1), ids, mx.array(0.0), axis=-1)
    rest = mx.log(mx.maximum(tail.sum(axis=-1, keepdims=True), TINY))
    return ids.astype(mx.int32), mx.concatenate([logs, rest], axis=-1)


def _times_log(p: mx.array) -> mx.array:
    """p log p, which is 0 at 0."""
    return p * mx.log(mx.maximum(p, TINY))
