"""Causal attention over one segment in blocks: what is masked is not computed, and no S x S array is made.

The forward takes some queries at a time with all keys that they may see, and keeps the output and each query's
log-sum-exp. The vjp takes tiles of queries x keys, makes their probabilities again and adds up: gradients by queries
tile after tile, those by keys and values in fp32, in a fixed order. Blocks and tiles follow from the segment's length
and the window alone, so bits depend on neither device memory nor the other rows. Heads that share keys are one
product, with no repeated keys. `mx.depends` chains tiles; else MLX would compute all before it drops the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx

from mlx_empire.model.attention.folded import blocks_left_out, rows_left_out, tiles_left_out
from mlx_empire.model.attention.tiling import (
    KEYS,
    QUERIES,
    Keys,
    Row,
    blocks,
    coarseness,
    mask_of_block,
    mask_of_tile,
    tiles,
)


def attend_in_blocks(attention: Attention, given: Sequence[mx.array]) -> mx.array:
    """softmax(q k^T scale) v over what is not masked, differentiable in all arrays `given`: q, k, v and perhaps sinks.

    q (rows, heads, S, D), k (rows, groups, S, D), v (rows, groups, S, Dv), sinks (heads,): the result is (rows, heads,
    S, Dv) in q's dtype.
    """
    return attend_with_sums(attention, given)[0]


def attend_with_sums(attention: Attention, given: Sequence[mx.array]) -> tuple[mx.array, mx.array]:
    """Attention of (q, k, v, sinks), differentiable, and each query's log-sum-exp (rows, heads, S) in fp32."""
    output, sums = _function(attention)(*given)
    return output, sums


def attend_again(
    attention: Attention, given: Sequence[mx.array], output: mx.array, sums: mx.array
) -> mx.array:
    """`output`, as `attend_with_sums` gave it with `sums`, differentiable in `given` and not computed again."""
    function: Any = mx.custom_function(lambda output, sums, *given: output)

    def vjp(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> list[mx.array]:
        output, sums, *given = primals
        own = attention.backward(given, [cotangent], (output, sums))
        return [mx.zeros_like(output), mx.zeros_like(sums), *own]

    function.vjp(vjp)
    result: mx.array = function(output, sums, *given)
    return result


def forward_operations(attention: Attention, q: mx.array, v: mx.array) -> int:
    """Of the forward's products."""
    pairs = sum((b - a) * (b - low) for a, b, low in blocks(q.shape[2], attention.window))
    return 2 * q.shape[0] * q.shape[1] * pairs * (q.shape[-1] + v.shape[-1])


def largest_scores(length: int) -> int:
    """The most scores of a head that are in one array for a segment of `length`."""
    return max((b - a) * (b - low) for a, b, low in blocks(length, 0))


@dataclass(frozen=True)
class Attention:
    """Of one segment: forward and vjp as MLX asks for them.

    `window`: see `Pattern`; `softcap`: scores become softcap tanh(scores / softcap). `folds`: only the graph counts,
    and what is alike is left out of it (`folded`).
    """

    scale: float
    window: int = 0
    softcap: float = 0.0
    folds: bool = False

    def forward(self, q: mx.array, k: mx.array, v: mx.array, *sinks: mx.array) -> tuple[mx.array, mx.array]:
        """The output, and the log-sum-exp of each query's scores (rows, heads, S) in fp32."""
        heads = _Heads.of(q, k)
        outputs: list[mx.array] = []
        sums: list[mx.array] = []
        parts = list(blocks(q.shape[2], self.window))
        left_out = blocks_left_out(len(parts)) if self.folds else range(0)
        before: list[mx.array] = []
        for n, (a, b, low) in enumerate(parts):
            if n in left_out:
                depths = (v.shape[-1], q.dtype), (1, mx.float32)
                before = [heads.by_head(heads.unmade(b - a, *one, before)) for one in depths]
                outputs.append(before[0])
                sums.append(before[1])
                continue
            query = heads.grouped(q, a, b) * self.scale
            if before:  # or the probabilities of a block would wait for their maximum to the end
                (query,) = mx.depends([query], before)
            mask = mask_of_block(a, b, low, self.window, heads.per_group).astype(q.dtype)
            keys = k[:, :, low:b].swapaxes(-1, -2)
            if self.softcap:
                scores = self.softcap * mx.tanh(query @ keys / self.softcap) + mask
            else:
                scores = mx.addmm(mask, query, keys)
            probabilities, total = _softmax(scores.astype(mx.float32), heads, sinks)
            outputs.append(heads.by_head(probabilities.astype(q.dtype) @ v[:, :, low:b]))
            sums.append(heads.by_head(total))
            before = [outputs[-1], sums[-1]]
        return heads.joined(outputs), heads.joined(sums)[..., 0]

    def backward(
        self, primals: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
    ) -> list[mx.array]:
        """The gradients by q, k, v and the sinks, if any."""
        q, k, v, *sinks = primals
        heads, (output, sums), by_output = _Heads.of(q, k), outputs, cotangents[0]
        inner = (by_output.astype(mx.float32) * output.astype(mx.float32)).sum(-1)
        tile = _Tile(self, heads, k, v)
        by_query = []
        step = QUERIES if self.window else KEYS * coarseness(q.shape[2], self.window)
        by_key, by_value = _KeySum(step), _KeySum(step)
        done: list[mx.array] = []
        found: mx.array | None
        rows = list(tiles(q.shape[2], self.window))
        left_out = self._left_out(rows)
        for n, ((a, b), columns) in enumerate(rows):
            if n in left_out:
                found = heads.unmade(b - a, q.shape[-1], mx.float32, done)
                done = [found, *by_key.unmade(a, b, k, done), *by_value.unmade(a, b, v, done)]
                by_query.append(heads.by_head((found * self.scale).astype(q.dtype)))
                continue
            query, cotangent, total, dot = (
                heads.grouped(x, a, b) for x in (q, by_output, sums[..., None], inner[..., None])
            )
            query = query * self.scale
            queries = tile.queries(query, cotangent, total, dot)
            found = None
            for c, d in self._made(columns):
                given = mx.depends(queries, done) if done else queries
                probabilities, by_score = tile.scored(given, (a, b), (c, d))
                part = (by_score @ k[:, :, c:d]).astype(mx.float32)
                found = part if found is None else found + part
                more = [by_score.swapaxes(-1, -2) @ query, probabilities.swapaxes(-1, -2) @ cotangent]
                done = [found, *by_key.add(c, more[0]), *by_value.add(c, more[1])]
            assert found is not None, "a query sees itself"
            by_query.append(heads.by_head((found * self.scale).astype(q.dtype)))
        gradients = [heads.joined(by_query), by_key.whole(k.dtype), by_value.whole(v.dtype)]
        if sinks:
            share = mx.exp(sinks[0].astype(mx.float32)[None, :, None] - sums)
            gradients.append(-(share * inner).sum((0, 2)).astype(sinks[0].dtype))
        return gradients

    def _made(self, columns: Sequence[Keys]) -> list[Keys]:
        """The tiles of a block of queries that are made."""
        left_out = tiles_left_out(len(columns)) if self.folds else range(0)
        return [one for n, one in enumerate(columns) if n not in left_out]

    def _left_out(self, rows: Sequence[Row]) -> range:
        """Of the vjp's blocks of queries."""
        if not self.folds:
            return range(0)
        (_, queries), _ = rows[0]
        return rows_left_out(len(rows), -(-self.window // queries), KEYS // QUERIES)


@cache
def _function(attention: Attention) -> Any:
    """MLX's function with our vjp."""
    function: Any = mx.custom_function(attention.forward)
    function.vjp(attention.backward)
    return function


def _softmax(scores: mx.array, heads: _Heads, sinks: Sequence[mx.array]) -> tuple[mx.array, mx.array]:
    """Probabilities, and log-sum-exp (.., 1); a sink is one more score, whose probability is dropped."""
    top = scores.max(axis=-1, keepdims=True)
    if not sinks:
        probabilities = mx.softmax(scores, axis=-1)
        # The greatest probability is exp(top - log-sum-exp): one logarithm for each query.
        return probabilities, top - mx.log(probabilities.max(axis=-1, keepdims=True))
    sink = heads.for_groups(sinks[0].astype(mx.float32), scores.shape[2])
    top = mx.maximum(top, sink)
    powers = mx.exp(scores - top)
    total = powers.sum(axis=-1, keepdims=True) + mx.exp(sink - top)
    return powers / total, top + mx.log(total)


@dataclass(frozen=True)
class _Heads:
    """Heads in groups that share keys; the heads of a group stand one below the other as rows of one matrix."""

    rows: int
    groups: int
    per_group: int

    @classmethod
    def of(cls, q: mx.array, k: mx.array) -> _Heads:
        return cls(q.shape[0], k.shape[1], q.shape[1] // k.shape[1])

    def grouped(self, x: mx.array, a: int, b: int) -> mx.array:
        """(rows, heads, S, D) -> (rows, groups, heads of a group x (b - a), D)."""
        depth = x.shape[-1]
        apart = x.reshape(self.rows, self.groups, self.per_group, -1, depth)
        return apart[:, :, :, a:b].reshape(self.rows, self.groups, -1, depth)

    def by_head(self, x: mx.array) -> mx.array:
        """(rows, groups, heads of a group x n, D) -> (rows, groups, heads of a group, n, D)."""
        return x.reshape(self.rows, self.groups, self.per_group, -1, x.shape[-1])

    def joined(self, parts: Sequence[mx.array]) -> mx.array:
        """What `by_head` gave for blocks of queries, in order -> (rows, heads, S, D)."""
        whole = parts[0] if len(parts) == 1 else mx.concatenate(list(parts), axis=3)
        return whole.reshape(self.rows, self.groups * self.per_group, -1, whole.shape[-1])

    def unmade(self, queries: int, depth: int, dtype: mx.Dtype, after: Sequence[mx.array]) -> mx.array:
        """What stands for what `by_head` is given of queries that are left out."""
        return _unmade((self.rows, self.groups, self.per_group * queries, depth), dtype, after)

    def for_groups(self, x: mx.array, queries: int) -> mx.array:
        """(heads,) -> (1, groups, queries of a group, 1)."""
        apart = x.reshape(1, self.groups, self.per_group, 1, 1)
        shape = (1, self.groups, self.per_group, queries // self.per_group, 1)
        return mx.broadcast_to(apart, shape).reshape(1, self.groups, queries, 1)


class _Tile:
    """Probabilities of a tile, and the gradients by its scores.

    In float32 without a softcap what is subtracted from each row of scores enters its product as one more column (of
    minus the row's figure, against ones), which saves two passes over the tile.
    """

    def __init__(self, attention: Attention, heads: _Heads, k: mx.array, v: mx.array) -> None:
        self._attention, self._heads = attention, heads
        self._wide = k.dtype == mx.float32 and not attention.softcap
        self._k, self._v = (_with_column(x, mx.ones((*x.shape[:-1], 1))) if self._wide else x for x in (k, v))

    def queries(self, query: mx.array, cotangent: mx.array, total: mx.array, dot: mx.array) -> list[mx.array]:
        """What tiles of these queries need; `total` (log-sum-exp) and `dot` (output x cotangent) by query."""
        if self._wide:
            return [_with_column(query, -total), _with_column(cotangent, -dot)]
        return [query, cotangent, total, dot]

    def scored(
        self, given: Sequence[mx.array], queries: tuple[int, int], keys: tuple[int, int]
    ) -> tuple[mx.array, mx.array]:
        """(probabilities, gradient by the scores) of a tile, in the dtype of the queries."""
        query, cotangent, *figures = given
        mask = mask_of_tile(queries, keys, self._attention.window, self._heads.per_group)
        k, v = (x[:, :, keys[0] : keys[1]].swapaxes(-1, -2) for x in (self._k, self._v))
        if self._wide:
            probabilities = mx.exp(query @ k if mask is None else mx.addmm(mask, query, k))
            return probabilities, probabilities * (cotangent @ v)
        total, dot = figures
        scores = (query @ k).astype(mx.float32)
        softcap = self._attention.softcap
        if softcap:
            bent = mx.tanh(scores / softcap)
            scores = bent * softcap
        probabilities = mx.exp((scores if mask is None else scores + mask) - total)
        by_score = probabilities * ((cotangent @ v).astype(mx.float32) - dot)
        if softcap:
            by_score = by_score * (1 - mx.square(bent))
        return probabilities.astype(query.dtype), by_score.astype(query.dtype)


class _KeySum:
    """A sum by keys in fp32, in pieces of `step` keys: a tile is added to those that it covers.

    A piece begins as long as the first tile that reaches it, and grows with those further down the diagonal.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._pieces: dict[int, mx.array] = {}

    def add(self, first: int, part: mx.array) -> list[mx.array]:
        """Add `part` (rows, groups, n, D) from the key `first` on, a multiple of `step`; the pieces it went to."""
        places = range(first, first + part.shape[2], self._step)
        part = part.astype(mx.float32)
        for place in places:
            piece = part if len(places) == 1 else part[:, :, place - first : place - first + self._step]
            if (held := self._pieces.get(place)) is not None:
                n = held.shape[2]
                rest = [piece[:, :, n:]] if n < piece.shape[2] else []
                piece = held + (piece[:, :, :n] if rest else piece)
                piece = mx.concatenate([piece, *rest], axis=2) if rest else piece
            self._pieces[place] = piece
        return [self._pieces[place] for place in places]

    def unmade(self, first: int, stop: int, keys: mx.array, after: Sequence[mx.array]) -> list[mx.array]:
        """What stands for the pieces that begin between these keys, where the queries there are left out."""
        places = range(-(-first // self._step) * self._step, stop, self._step)
        shape = (*keys.shape[:2], self._step, keys.shape[-1])
        self._pieces |= {place: _unmade(shape, mx.float32, after) for place in places}
        return [self._pieces[place] for place in places]

    def whole(self, dtype: mx.Dtype) -> mx.array:
        """(rows, groups, S, D)"""
        return mx.concatenate([self._pieces[place] for place in sorted(self._pieces)], axis=2).astype(dtype)


def _unmade(shape: Sequence[int], dtype: mx.Dtype, after: Sequence[mx.array]) -> mx.array:
    """A result of that size that cannot be made before those `after` which it comes."""
    (number,) = mx.depends([mx.array(0, dtype)], list(after))
    return mx.full(shape, number)


def _with_column(x: mx.array, column: mx.array) -> mx.array:
    return mx.concatenate([x, column], axis=-1)
