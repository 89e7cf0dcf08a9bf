"""Masks are recognised if they are a pattern and only then; layers attend by it if they hand their mask over."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.base import create_attention_mask, create_causal_mask
from support.tiny_models import tiny_config, tiny_model

from mlx_empire.model.attention.by_pattern import ByPattern
from mlx_empire.model.attention.patterns import Pattern, cuts_of, recognise, telling_width
from mlx_empire.model.attention.segments import Kernels
from mlx_empire.model.layers import SlottedModel, given_mask

WIDTH = 300
# By family, by layer: the pattern of 300 positions; None where the mask stays.
LAYERS = {
    "llama": [Pattern()] * 4,
    "qwen3_moe": [Pattern()] * 4,
    "gpt_oss": [Pattern(window=64), Pattern()] * 2,
    "gemma3_text": [Pattern(window=64), Pattern()] * 2,
    "llama4": [Pattern(chunk=32)] * 3 + [Pattern()],
    "gemma2": [None] * 4,
    "deepseek_v3": [None] * 4,
    "mamba2": [None] * 4,
}


@pytest.mark.parametrize("family", LAYERS)
def test_layers_attend_by_the_patterns_of_their_masks(family):
    build, _ = tiny_model(family)
    model = build()
    slotted = SlottedModel(model, family)
    hidden, arguments = slotted.capture(mx.zeros((1, WIDTH), mx.int32))
    settled = ByPattern(slotted.layers, Kernels()).settled(hidden, arguments)
    assert [one.pattern for one in settled] == LAYERS[family]
    for layer, before, after in zip(slotted.layers, arguments, settled, strict=True):
        kept = given_mask(layer, before) if after.pattern is None else "causal"
        assert given_mask(layer, after) is kept or given_mask(layer, after) == kept


@pytest.mark.parametrize("family", LAYERS)
def test_what_long_rows_attend_to_shows_on_rows_that_are_just_long_enough(family):
    """So a plan for them makes no mask of their square."""
    config = tiny_config(family)
    seen = telling_width(config.get("text_config") or config, 100_000)
    assert 256 < seen <= 600
    build, _ = tiny_model(family)
    slotted = SlottedModel(build(), family)
    short, long = (
        ByPattern(slotted.layers, Kernels()).patterns(*slotted.capture(mx.zeros((1, width), mx.int32)))
        for width in (seen, 1200)
    )
    assert short == long


def test_short_rows_keep_their_masks():
    build, _ = tiny_model("llama")
    model = build()
    slotted = SlottedModel(model, "llama")
    hidden, arguments = slotted.capture(mx.zeros((1, 256), mx.int32))
    assert ByPattern(slotted.layers, Kernels()).settled(hidden, arguments) == arguments


def seen(width: int, window: int, chunk: int) -> np.ndarray:
    """Pair by pair."""

    def may(i: int, j: int) -> bool:
        return j <= i and (not window or i - j < window) and (not chunk or i // chunk == j // chunk)

    return np.array([[may(i, j) for j in range(width)] for i in range(width)])


@given(width=st.integers(2, 24), window=st.integers(0, 30), chunk=st.integers(0, 30), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_mask_is_recognised_as_what_it_is_or_not_at_all(width, window, chunk, data):
    """Whatever is found says the same of every pair; a mask with one pair changed is never the one it was."""
    mask = seen(width, window, chunk)
    found = recognise(mx.array(mask), width)
    if not (window and chunk):
        assert found is not None
    if found is not None:
        assert np.array_equal(seen(width, found.window, found.chunk), mask)
    i, j = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, width - 1))
    mask[i, j] ^= True
    other = recognise(mx.array(mask), width)
    assert other is None or np.array_equal(seen(width, other.window, other.chunk), mask)


def test_every_mask_that_mlx_lm_makes_is_recognised():
    hidden = mx.zeros((1, WIDTH, 8))
    assert recognise(create_attention_mask(hidden), WIDTH) == Pattern()
    assert recognise(create_attention_mask(hidden, return_array=True), WIDTH) == Pattern()
    assert recognise(create_attention_mask(hidden, window_size=70), WIDTH) == Pattern(window=70)
    assert recognise(create_causal_mask(WIDTH, window_size=WIDTH), WIDTH) == Pattern()


@pytest.mark.parametrize(
    "mask",
    [
        None,
        "bidirectional",
        mx.zeros((WIDTH, WIDTH)),  # additive
        mx.ones((WIDTH, WIDTH), mx.bool_),
        mx.zeros((WIDTH, WIDTH), mx.bool_),
        create_causal_mask(WIDTH, offset=4),
        create_causal_mask(WIDTH, left_padding=mx.array([3])),
        mx.broadcast_to(create_causal_mask(WIDTH), (2, 1, WIDTH, WIDTH)),
    ],
)
def test_other_masks_are_not(mask):
    assert recognise(mask, WIDTH) is None


def test_documents_cut_rows():
    documents = np.array([[0, 0, 1, 1, 2, -1], [0, 0, 0, 0, 0, 0]])
    assert cuts_of(documents) == ((0, 2, 4, 5), (0,))
    assert Pattern(chunk=3, cuts=cuts_of(documents)).segments(0, 6) == (
        (0, 2),
        (2, 3),
        (3, 4),
        (4, 5),
        (5, 6),
    )
