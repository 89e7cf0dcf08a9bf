"""Lion and SGD with momentum against their published rules in float64, and their moment in 8 bits."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from optim import reference

from mlx_empire.optim import codec, rounding
from mlx_empire.optim.flat import FlatOptimizer
from mlx_empire.optim.momentum import Lion, Sgd
from mlx_empire.optim.protocol import ChunkId, State, StepScalars

ROWS = 21
CHUNK = ChunkId(tensor=3, first_row=0, decay=True)


def gradient(step: int) -> np.ndarray:
    rng = np.random.default_rng(step)
    return (rng.normal(size=(ROWS, 64)) * np.exp(rng.normal(size=(ROWS, 64)) - 4)).astype(np.float32)


def start() -> np.ndarray:
    return (np.random.default_rng(5).normal(size=(ROWS, 64)) * 0.05).astype(np.float32)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_sgd_is_the_textbooks(decay: float) -> None:
    optimizer = Sgd(0.9, decay)
    w = mx.array(start())
    state = optimizer.init(w, quantised=True)
    w64, m64 = start().astype(np.float64), np.zeros((ROWS, 64))
    for step in range(1, 30):
        w, state = optimizer.update(w, state, mx.array(gradient(step)), CHUNK, StepScalars(step, 1e-2, 0.5))
        w64, m64 = reference.sgd(w64, m64, 0.5 * gradient(step).astype(np.float64), 1e-2, 0.9, decay)
    np.testing.assert_allclose(np.array(state["m"]), m64, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(np.array(w), w64, rtol=0, atol=30 * 2.0**-26)  # a rounding a step, |w| < 1/4


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_lion_is_the_papers(decay: float) -> None:
    optimizer = Lion((0.9, 0.99), decay)
    w = mx.array(start())
    state = optimizer.init(w, quantised=True)
    m64 = np.zeros((ROWS, 64))
    for step in range(1, 30):
        before = np.array(w, np.float64)
        w, state = optimizer.update(w, state, mx.array(gradient(step)), CHUNK, StepScalars(step, 1e-3, 0.5))
        w64, m64, c = reference.lion(
            before, m64, 0.5 * gradient(step).astype(np.float64), 1e-3, (0.9, 0.99), decay
        )
        clear = np.abs(c) > 1e-7  # float32 may see another sign of almost nothing
        assert clear.mean() > 0.99
        np.testing.assert_allclose(np.array(w, np.float64)[clear], w64[clear], rtol=3e-7, atol=1e-9)
    np.testing.assert_allclose(np.array(state["m"]), m64, rtol=2e-6, atol=1e-7)


def test_codes_of_a_lone_moment_are_the_references() -> None:
    rng = np.random.default_rng(0)
    m = (
        rng.normal(size=(512, 64)) * np.exp(rng.normal(size=(512, 64)) * rng.uniform(0, 3, (512, 1)))
    ).astype(np.float32)
    m[0], m[1], m[2, 1:], m[3] = 0, 1e-40, 0, 3.3e38
    key = (7, 40, 3, 1)
    state = codec.encode_lone_first(mx.array(m), rounding.row_keys(512, *key))
    codes, scale, _ = reference.encode_lone_first(m, reference.noise(512, *key))
    np.testing.assert_array_equal(np.array(state["m_scale"].astype(mx.float32)), scale)
    differ = np.array(state["m_codes"]).astype(int) - codes
    assert np.abs(differ).max() <= 1  # float32 against float64, where the draw is nearly the chance
    assert np.count_nonzero(differ) <= 1e-3 * differ.size


def test_a_lone_moment_is_unbiased() -> None:
    rng = np.random.default_rng(1)
    row = (rng.normal(size=(1, 64)) * np.exp(2 * rng.normal(size=(1, 64)))).astype(np.float32)
    state = codec.encode_lone_first(
        mx.array(np.repeat(row, 4096, axis=0)), rounding.row_keys(4096, 1, 0, 1, 0)
    )
    decoded = np.array(codec.decode_first(state), np.float64)
    _, scale, p = reference.encode_lone_first(row, np.ones_like(row))
    q = np.minimum(np.floor(127 * np.sqrt(np.abs(row) / scale)), 126)
    sigma = (2 * q + 1) / 127**2 * scale * np.sqrt(np.clip(p * (1 - p), 0, None) / 4096)
    assert (np.abs(decoded.mean(axis=0) - row) <= 4 * sigma + 1e-6 * scale).all()


@pytest.mark.parametrize(
    ("make", "bound"), [(Lion, 0.08), (lambda **k: Sgd(0.9, **k), 0.03)], ids=["lion", "sgd"]
)
def test_8_bits_follow_32(make, bound: float) -> None:
    """A hundred steps on gradients with a steady part, which rounding to nearest would stall on."""
    steady = gradient(0)
    ends = []
    for bits in (32, 8):
        optimizer: FlatOptimizer = make(state_bits=bits)
        w = mx.zeros((ROWS, 64))
        state = optimizer.init(w, quantised=True)
        for step in range(1, 101):
            g = mx.array(steady + gradient(step))
            w, state = optimizer.update(w, state, g, CHUNK, StepScalars(step, 1e-3))
        ends.append(np.array(w, np.float64))
    assert 0 < np.linalg.norm(ends[1] - ends[0]) / np.linalg.norm(ends[0]) <= bound


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("kind", [Lion, Sgd])
@pytest.mark.parametrize("master", ["exact", "diet", "fp32", "none"])
def test_nothing_depends_on_how_a_tensor_is_cut(kind: type, bits: int, master: str) -> None:
    optimizer = kind(weight_decay=0.01, state_bits=bits, master_weights=master)
    whole = mx.array(start()).astype(mx.bfloat16)
    edges = (0, 1, 7, ROWS)
    parts = [whole[a:b] for a, b in pairwise(edges)]
    states: list[State] = [optimizer.init(part, quantised=True) for part in parts]
    state = optimizer.init(whole, quantised=True)
    for step in range(1, 5):
        scalars = StepScalars(step, 1e-3, 0.9)
        g = mx.array(gradient(step)).astype(mx.bfloat16)
        whole, state = optimizer.update(whole, state, g, ChunkId(5, 1000, True), scalars)
        for i, a in enumerate(edges[:-1]):
            piece = g[a : a + parts[i].shape[0]]
            parts[i], states[i] = optimizer.update(
                parts[i], states[i], piece, ChunkId(5, 1000 + a, True), scalars
            )
    assert mx.array_equal(mx.concatenate(parts), whole).item()
    for name in state:
        assert mx.array_equal(mx.concatenate([s[name] for s in states]), state[name]).item()


@pytest.mark.parametrize("kind", [Lion, Sgd])
def test_states_convert_between_widths(kind: type) -> None:
    eight, full = kind(state_bits=8), kind(state_bits=32)
    w = mx.array(start()).astype(mx.bfloat16)
    state = eight.init(w, quantised=True)
    w, state = eight.update(w, state, mx.array(gradient(1)), CHUNK, StepScalars(1, 1e-3))
    decoded = full.convert(state, CHUNK, StepScalars(1, 1e-3), quantised=True)
    assert set(decoded) == {"m", "remainder"}
    again = eight.convert(decoded, CHUNK, StepScalars(1, 1e-3), quantised=True)
    first, second = (np.array(codec.decode_first(one), np.float64) for one in (state, again))
    scale = np.array(again["m_scale"].astype(mx.float32), np.float64)
    step = (2 * 127 * np.sqrt(np.abs(first) / scale) + 1) / 127**2 * scale  # from one code to the next
    assert (np.abs(second - first) <= 1.01 * step).all()
    assert (second == first).mean() > 0.2  # where the row's scale came back the same
