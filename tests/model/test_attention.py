"""Attention in blocks and by segments against float64 with a mask that numpy makes, and against MLX's own."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_empire.model.attention import tiling
from mlx_empire.model.attention.patterns import Pattern
from mlx_empire.model.attention.segments import Kernels, attend

PLAIN = mx.fast.scaled_dot_product_attention
HEADS, GROUPS, DEPTH = 6, 2, 16
# By name: positions, rows, pattern, whether there are sinks, softcap.
PATTERNS: dict[str, tuple[int, int, Pattern, bool, float]] = {
    "causal": (700, 1, Pattern(), False, 0),
    "window": (600, 1, Pattern(window=100), False, 0),
    "window longer than a block": (900, 1, Pattern(window=300), False, 0),
    "chunks of which some are short": (900, 2, Pattern(chunk=400), False, 0),
    "documents": (700, 2, Pattern(cuts=((0, 100, 333), (0, 650))), False, 0),
    "documents and a window": (700, 2, Pattern(window=90, cuts=((0, 100, 333), (0, 650))), False, 0),
    "documents and chunks": (700, 2, Pattern(chunk=300, cuts=((0, 100, 333), (0, 650))), False, 0),
    "sinks": (600, 1, Pattern(), True, 0),
    "sinks and a window": (600, 1, Pattern(window=128), True, 0),
    "a softcap": (600, 1, Pattern(), False, 5.0),
    "a softcap and a window": (600, 1, Pattern(window=77), False, 5.0),
    "a softcap and sinks": (300, 1, Pattern(), True, 5.0),
}


def allowed(pattern: Pattern, rows: int, width: int) -> np.ndarray:
    """(rows, 1, width, width) booleans, pair by pair."""
    found = np.zeros((rows, 1, width, width), bool)
    place = np.arange(width)
    for row in range(rows):
        starts = pattern.cuts[row] if pattern.cuts else (0,)
        document = np.searchsorted(starts, place, side="right")
        same = document[:, None] == document[None]
        distance = place[:, None] - place[None]
        found[row, 0] = same & (distance >= 0)
        if pattern.window:
            found[row, 0] &= distance < pattern.window
        if pattern.chunk:
            found[row, 0] &= place[:, None] // pattern.chunk == place[None] // pattern.chunk
    return found


def exact(arrays: list[mx.array], seen: np.ndarray, scale: float, softcap: float) -> list[np.ndarray]:
    """The output and the gradients of sum(output * w) by q, k, v and sinks, all in float64."""
    q, k, v, w, *sinks = (np.array(x.astype(mx.float32), np.float64) for x in arrays)
    k, v = (np.repeat(x, HEADS // GROUPS, axis=1) for x in (k, v))
    scores = q @ k.swapaxes(-1, -2) * scale
    bent = np.tanh(scores / softcap) if softcap else scores
    scores = np.where(seen, bent * softcap if softcap else scores, -np.inf)
    shape = (*scores.shape[:-1], 1)
    extra = np.broadcast_to(sinks[0].reshape(1, -1, 1, 1), shape) if sinks else np.full(shape, -np.inf)
    powers = np.exp(np.concatenate([scores, extra], -1) - np.maximum(scores.max(-1, keepdims=True), extra))
    probabilities = powers / powers.sum(-1, keepdims=True)
    p, sink = probabilities[..., :-1], probabilities[..., -1]
    output = p @ v
    inner = (w * output).sum(-1, keepdims=True)
    by_score = p * (w @ v.swapaxes(-1, -2) - inner) * ((1 - bent**2) if softcap else 1)
    by_key, by_value = by_score.swapaxes(-1, -2) @ q * scale, p.swapaxes(-1, -2) @ w
    by_key, by_value = (x.reshape(len(x), GROUPS, -1, *x.shape[2:]).sum(2) for x in (by_key, by_value))
    found = [output, by_score @ k * scale, by_key, by_value]
    return [*found, -(sink * inner[..., 0]).sum((0, 2))] if sinks else found


def drawn(width: int, rows: int, sinks: bool, dtype: mx.Dtype) -> list[mx.array]:
    mx.random.seed(width)
    shapes = [(rows, heads, width, DEPTH) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    return [mx.random.normal(s).astype(dtype) for s in [*shapes, *([(HEADS,)] if sinks else [])]]


def differentiated(attention: Any, arrays: list[mx.array]) -> list[mx.array]:
    q, k, v, w, *sinks = arrays
    outputs, gradients = mx.vjp(lambda *given: [attention(*given)], [q, k, v, *sinks], [w])
    mx.eval(outputs, gradients)
    return [*outputs, *gradients]


def by_pattern(pattern: Pattern, softcap: float = 0.0, **kernels: Any) -> Any:
    def attention(q: mx.array, k: mx.array, v: mx.array, *sinks: mx.array) -> mx.array:
        more = {"sinks": sinks[0] if sinks else None, "softcap": softcap, "plain": PLAIN}
        return attend(q, k, v, scale=DEPTH**-0.5, pattern=pattern, kernels=Kernels(**kernels), **more)

    return attention


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", PATTERNS)
def test_output_and_gradients_are_those_of_float64(name, dtype):
    width, rows, pattern, sinks, softcap = PATTERNS[name]
    arrays = drawn(width, rows, sinks, dtype)
    expected = exact(arrays, allowed(pattern, rows, width), DEPTH**-0.5, softcap)
    found = differentiated(by_pattern(pattern, softcap), arrays)
    errors = [
        np.abs(np.array(a.astype(mx.float32)) - e).max() / np.abs(e).max()
        for a, e in zip(found, expected, strict=True)
    ]
    print(f"{name} {dtype}: {' '.join(f'{e:.1e}' for e in errors)}")
    assert max(errors) < (2e-6 if dtype == mx.float32 else 2e-2)


@pytest.mark.parametrize("pattern", [Pattern(), Pattern(window=200)])
def test_coarser_tiles_of_longer_rows_are_right_too(pattern, monkeypatch):
    monkeypatch.setattr(tiling, "FINE", 60)  # so that tiles are four times as long and as wide
    arrays = drawn(900, 1, False, mx.float32)
    expected = exact(arrays, allowed(pattern, 1, 900), DEPTH**-0.5, 0.0)
    found = differentiated(by_pattern(pattern), arrays)
    for a, e in zip(found, expected, strict=True):
        assert np.abs(np.array(a) - e).max() < 2e-6 * np.abs(e).max()


def test_a_document_in_a_packed_row_is_the_same_document_alone():
    """Bit for bit, whatever stands beside it: alone in its segment, and with no other documents in the row."""
    q, k, v, w = drawn(1100, 1, False, mx.float32)
    for pattern in (Pattern(), Pattern(window=70), Pattern(chunk=384)):
        # Chunks are counted from the row's beginning, so there the document begins where a chunk does.
        a, b = (384, 900) if pattern.chunk else (300, 900)
        together = differentiated(by_pattern(pattern.packed(((0, 120, a, b),))), [q, k, v, w])
        alone = differentiated(by_pattern(pattern), [x[:, :, a:b] for x in (q, k, v, w)])
        for one, part in zip(alone, together, strict=True):
            assert mx.array_equal(one, part[:, :, a:b])


def test_a_row_does_not_depend_on_the_rows_beside_it():
    """Bit for bit, with documents cut in other places."""
    arrays = drawn(700, 2, False, mx.float32)
    cuts = ((0, 310), (0, 100, 333))
    both = differentiated(by_pattern(Pattern(cuts=cuts)), arrays)
    for row in range(2):
        one = differentiated(by_pattern(Pattern(cuts=(cuts[row],))), [x[row : row + 1] for x in arrays])
        assert all(mx.array_equal(a, b[row : row + 1]) for a, b in zip(one, both, strict=True))


def test_short_segments_are_mlx_s_own_bit_for_bit():
    arrays = drawn(256, 1, False, mx.float32)
    own = differentiated(lambda q, k, v: PLAIN(q, k, v, scale=DEPTH**-0.5, mask="causal"), arrays)
    assert all(map(mx.array_equal, differentiated(by_pattern(Pattern()), arrays), own))


def test_what_is_masked_is_not_made():
    """Beside MLX's own on the same arrays: 2,048 positions and eight documents take less than a fifth of its peak."""
    arrays = drawn(2048, 1, False, mx.float32)
    pattern = Pattern(cuts=(tuple(range(0, 2048, 256)),))
    mask = mx.array(allowed(pattern, 1, 2048))
    mx.eval(arrays, mask)

    def peak(attention: Any) -> int:
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        differentiated(attention, arrays)
        return mx.get_peak_memory() - before

    whole = peak(lambda q, k, v: PLAIN(q, k, v, scale=DEPTH**-0.5, mask=mask))
    ratios = {
        name: peak(by_pattern(one)) / whole for name, one in (("packed", pattern), ("causal", Pattern()))
    }
    print(ratios)
    assert ratios["packed"] < 0.2
    assert ratios["causal"] < 0.5


# ---- which kernel


@pytest.mark.parametrize("depth", [64, 100, 128])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [0, 96])
def test_on_metal_causal_segments_go_to_the_fused_kernel_and_others_do_not(depth, sinks, window):
    """Shapes alone. An array mask has no fused backward, nor have sinks, nor a head dim that is not in its table."""
    told: list[tuple[int, object, bool]] = []

    def plain(q: mx.array, k: mx.array, v: mx.array, *, mask: object, sinks: Any, scale: float) -> mx.array:
        told.append((q.shape[2], mask, sinks is not None))
        return mx.zeros((*q.shape[:3], v.shape[3]))

    q, k, v = (mx.zeros((1, heads, 1500, depth)) for heads in (4, 2, 2))
    pattern = Pattern(window=window, cuts=((0, 400, 1100),))
    kernels = Kernels(fused=True, short=0)
    given = mx.zeros(4) if sinks else None
    attend(q, k, v, scale=1.0, pattern=pattern, kernels=kernels, plain=plain, sinks=given)
    fused = depth in (64, 128) and not sinks and not window
    assert told == ([(400, "causal", False), (700, "causal", False), (400, "causal", False)] if fused else [])
