"""The global gradient norm is one number, however the rows are spread over ranks."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_empire.model.spec import TensorSpec, UnitSpec
from mlx_empire.optim.norm import CHUNK_ROWS, GradientNorm, NormLayout, NormPartials, block_sums, clip_scale
from mlx_empire.plan.shards import make_plan

LENGTHS = (2 * CHUNK_ROWS + 999, 70, CHUNK_ROWS, 0, 3 * CHUNK_ROWS)
RNG = np.random.default_rng(0)
BLOCKS = [np.exp(4 * RNG.normal(size=n)).astype(np.float32) for n in LENGTHS]


def norm_of(edges: tuple[tuple[int, ...], ...], blocks: list[np.ndarray], piece: int = 10**9) -> GradientNorm:
    layout = NormLayout(edges)
    packed = []
    for rank in range(layout.world_size):
        partials = NormPartials(layout, rank)
        for segment in reversed(range(len(blocks))):  # a backward pass completes the last segment first
            a, b = layout.interval(segment, rank)
            for start in range(a, b, piece):
                partials.add(segment, blocks[segment][start : min(start + piece, b)])
        packed.append(partials.packed())
        assert tuple(x.size for x in packed[-1]) == layout.lengths(rank)
        assert [x.dtype for x in packed[-1]] == [np.float64, np.float32]
    return layout.combine(packed)


ALONE = norm_of(tuple((0, n) for n in LENGTHS), BLOCKS)


def test_it_is_the_norm() -> None:
    assert ALONE.value == pytest.approx(math.sqrt(math.fsum(float(x) for b in BLOCKS for x in b)), rel=1e-13)
    assert ALONE.bad_segments == ()


@given(data=st.data(), ranks=st.integers(1, 5), piece=st.sampled_from([1 << 20, CHUNK_ROWS, 5000, 16_411]))
@settings(max_examples=60, deadline=None)
def test_any_partition_gives_the_same_bits(data: st.DataObject, ranks: int, piece: int) -> None:
    edges = []
    for n in LENGTHS:
        near = st.sampled_from([c for c in range(0, n + 1, CHUNK_ROWS)] + [n])
        cut = st.one_of(st.integers(0, n), near)
        cuts = sorted(data.draw(st.lists(cut, min_size=ranks - 1, max_size=ranks - 1)))
        edges.append((0, *cuts, n))
    assert norm_of(tuple(edges), BLOCKS, piece) == ALONE


def test_bad_segments_are_named() -> None:
    blocks = [b.copy() for b in BLOCKS]
    blocks[0][CHUNK_ROWS + 3] = np.inf
    blocks[4][5] = np.nan
    for edges in (tuple((0, n) for n in LENGTHS), tuple((0, n // 3, n // 2, n) for n in LENGTHS)):
        norm = norm_of(edges, blocks)
        assert norm.bad_segments == (0, 4)
        assert not math.isfinite(norm.value)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_block_sums(dtype: mx.Dtype) -> None:
    rows = (1 << 14) + 77  # more than one piece
    g = mx.array(np.random.default_rng(3).normal(size=(rows, 64)).astype(np.float32)).astype(dtype)
    (sums,) = block_sums(g)
    values = np.array(g.astype(mx.float32), np.float64)
    np.testing.assert_allclose(sums, (values**2).sum(axis=1), rtol=1e-6)
    for a, b in ((0, 1), (16_380, 16_400), (5, rows)):
        np.testing.assert_array_equal(block_sums(g[a:b])[0], sums[a:b])
    assert block_sums(g[:0])[0].shape == (0,)


def test_layout_of_a_plan() -> None:
    tensors = [TensorSpec("a.weight", (100, 128), "bfloat16"), TensorSpec("a.bias", (128,), "bfloat16")]
    plan = make_plan([UnitSpec("root", tuple(tensors))], (2, 1, 1), 3)
    layout = NormLayout.of(plan)
    trained = [s for s in plan.units[0].segments if s.kind != "frozen"]
    assert layout.world_size == 3
    assert [edges[-1] * 64 for edges in layout.edges] == [s.size for s in trained]


def test_clipping() -> None:
    assert clip_scale(5.0, None) == 1.0
    assert clip_scale(0.5, 1.0) == 1.0
    assert clip_scale(0.0, 1.0) == 1.0
    assert clip_scale(4.0, 1.0) == 0.25
