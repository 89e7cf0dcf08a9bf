"""AdamW on chunks against the textbook in float64, and what must hold to the bit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from optim import reference

from mlx_empire.optim import compile, master
from mlx_empire.optim.adamw import AdamW
from mlx_empire.optim.choose import make_optimizer
from mlx_empire.optim.momentum import Lion, Sgd
from mlx_empire.optim.protocol import ChunkId, State, StepScalars
from mlx_empire.recipe.update_sections import OptimizerSection

ROWS = 37
CHUNK = ChunkId(tensor=99, first_row=0, decay=True)


def gradient(step: int, rows: int = ROWS) -> np.ndarray:
    rng = np.random.default_rng(step)
    return (rng.normal(size=(rows, 64)) * np.exp(2 * rng.normal(size=(rows, 64)) - 6)).astype(np.float32)


def start(rows: int = ROWS) -> np.ndarray:
    return (np.random.default_rng(77).normal(size=(rows, 64)) * 0.05).astype(np.float32)


def same(a: tuple[mx.array, State], b: tuple[mx.array, State]) -> bool:
    """Equal bits of weights and of every state array."""
    (wa, sa), (wb, sb) = a, b
    assert sa.keys() == sb.keys()
    pairs = [(wa, wb), *((sa[name], sb[name]) for name in sa)]
    return all(x.dtype == y.dtype and mx.array_equal(x, y).item() for x, y in pairs)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.0, 0.5)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_update_is_the_textbooks(betas: tuple[float, float], decay: float) -> None:
    optimizer = AdamW(betas, 1e-8, decay)
    w = mx.array(start())
    state = optimizer.init(w, quantised=True)
    w64 = start().astype(np.float64)
    m64 = v64 = allowed = np.zeros_like(w64)
    for step in range(1, 16):
        lr, clip = 1e-3 / step, 0.5
        g = gradient(step)
        w, state = optimizer.update(w, state, mx.array(g), CHUNK, StepScalars(step, lr, clip))
        before = w64
        g64 = clip * g.astype(np.float64)
        w64, m64, v64 = reference.adamw(w64, m64, v64, g64, step, lr, betas, 1e-8, decay)
        ours = np.array(w, np.float64)
        # One rounding of the float32 weight a step, and a millionth of an update (which is about lr).
        largest = np.maximum(np.abs(before), np.abs(w64)).astype(np.float32)
        allowed = allowed + 0.5 * np.spacing(np.nextafter(largest, np.float32(1))) + 1e-6 * lr
        assert (np.abs(ours - w64) <= allowed).all()


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_one_step_from_the_same_state_is_exact_to_float32(bits: int, dtype: mx.Dtype) -> None:
    optimizer = AdamW(state_bits=bits)
    w = mx.array(start()).astype(dtype)
    state = optimizer.init(w, quantised=True)
    for step in range(1, 12):
        g = gradient(step)
        kept = AdamW(state_bits=32).convert(state, CHUNK, StepScalars(step, 0.0), quantised=True)
        m, v = np.array(kept["m"]), np.array(kept["v"])
        zero = mx.zeros_like(w)  # from a zero weight the update is seen without its rounding
        still = {n: mx.zeros_like(a) if n == "remainder" else a for n, a in state.items()}
        moved, after = optimizer.update(zero, still, mx.array(g), CHUNK, StepScalars(step, 1e-3))
        full = master.join(moved, after["remainder"]) if dtype == mx.bfloat16 else moved
        expected, _, _ = reference.adamw(np.zeros_like(m), m, v, g, step, 1e-3)
        error = np.linalg.norm(np.array(full, np.float64) - expected) / np.linalg.norm(expected)
        assert error < 1e-6
        w, state = optimizer.update(w, state, mx.array(g), CHUNK, StepScalars(step, 1e-3))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("cuts", [(1, 2), (13,), (5, 6, 36)])
def test_nothing_depends_on_how_a_tensor_is_cut(bits: int, dtype: mx.Dtype, cuts: tuple[int, ...]) -> None:
    first_row = 2**31 - 7  # far into a very large tensor
    optimizer = AdamW(weight_decay=0.01, state_bits=bits)
    whole = mx.array(start()).astype(dtype)
    edges = (0, *cuts, ROWS)
    parts = [whole[a:b] for a, b in pairwise(edges)]
    states = [optimizer.init(part, quantised=True) for part in parts]
    state = optimizer.init(whole, quantised=True)
    for step in range(1, 5):
        scalars = StepScalars(step, 1e-3, 0.9)
        g = mx.array(gradient(step)).astype(dtype)
        whole, state = optimizer.update(whole, state, g, ChunkId(5, first_row, True), scalars)
        for i, a in enumerate(edges[:-1]):
            chunk = ChunkId(5, first_row + a, True)
            piece = g[a : a + parts[i].shape[0]]
            parts[i], states[i] = optimizer.update(parts[i], states[i], piece, chunk, scalars)
    joined = {name: mx.concatenate([s[name] for s in states]) for name in state}
    assert same((mx.concatenate(parts), joined), (whole, state))


def test_rounding_noise_differs_between_tensors_steps_and_salts() -> None:
    optimizer = AdamW(state_bits=8)
    w, g = mx.array(start()), mx.array(gradient(1))

    def codes(tensor: int = 1, step: int = 1, salt: int = 0) -> mx.array:
        state = optimizer.init(w, quantised=True)
        scalars = StepScalars(step, 1e-3, salt=salt)
        return optimizer.update(w, state, g, ChunkId(tensor, 0, True), scalars)[1]["v_codes"]

    assert mx.array_equal(codes(), codes()).item()
    for other in (codes(tensor=2), codes(step=2), codes(salt=1)):
        assert not mx.array_equal(codes(), other).item()


@pytest.mark.parametrize("bits", [32, 8])
def test_zero_gradients_only_decay(bits: int) -> None:
    optimizer = AdamW(weight_decay=0.1, state_bits=bits)
    w = mx.array(start())
    state = optimizer.init(w, quantised=True)
    for step in range(1, 6):
        for decay in (False, True):
            scalars = StepScalars(step, 1e-2)
            after, state = optimizer.update(w, state, mx.zeros_like(w), ChunkId(1, 0, decay), scalars)
            expected = np.array(w, np.float64) * (1 - 1e-3 if decay else 1)
            np.testing.assert_allclose(np.array(after), expected, rtol=1e-7)
        w = after
    kept = AdamW().convert(state, CHUNK, StepScalars(1, 0.0), quantised=True)
    assert not mx.any(kept["m"]).item()
    assert not mx.any(kept["v"]).item()


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_bytes_are_the_bytes(bits: int, quantised: bool, dtype: str) -> None:
    optimizer = AdamW(state_bits=bits)
    w = mx.zeros((ROWS, 64), getattr(mx, dtype))
    state = optimizer.init(w, quantised=quantised)
    said = optimizer.state_bytes(ROWS * 64, dtype, quantised=quantised)
    assert said == {name: array.nbytes for name, array in state.items()}
    new, after = optimizer.update(w, state, mx.zeros((ROWS, 64)), CHUNK, StepScalars(1, 1e-3))
    assert said == {name: array.nbytes for name, array in after.items()}
    assert new.dtype == w.dtype
    if bits == 8 and quantised:
        assert sum(said.values()) / (ROWS * 64) <= (2.10 if dtype == "float32" else 4.10)


@pytest.mark.skipif(
    not compile.may_compile(), reason="no C++ compiler: everything runs operation by operation"
)
@pytest.mark.parametrize("bits", [32, 8])
def test_fused_and_plain_operations_give_the_same_bits(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[mx.array, State]:
        optimizer = AdamW(weight_decay=0.1, state_bits=bits)
        w = mx.array(start()).astype(mx.bfloat16)
        state = optimizer.init(w, quantised=True)
        for step in range(1, 6):
            w, state = optimizer.update(
                w, state, mx.array(gradient(step)), CHUNK, StepScalars(step, 1e-3, 0.3)
            )
        return w, state

    fused = run()
    monkeypatch.setattr(compile, "may_compile", lambda: False)
    assert same(fused, run())


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_gradient_stays_visible_and_in_its_row(bits: int, bad: float) -> None:
    optimizer = AdamW(state_bits=bits)
    w = mx.array(start()).astype(mx.bfloat16)
    g = gradient(1)
    clean = optimizer.update(w, optimizer.init(w, quantised=True), mx.array(g), CHUNK, StepScalars(1, 1e-3))
    g[4, 7] = bad
    dirty = optimizer.update(w, optimizer.init(w, quantised=True), mx.array(g), CHUNK, StepScalars(1, 1e-3))
    assert np.isnan(np.array(dirty[0].astype(mx.float32))[4, 7])
    others = np.arange(ROWS) != 4
    for a, b in ((clean[0], dirty[0]), *((clean[1][n], dirty[1][n]) for n in clean[1])):
        np.testing.assert_array_equal(
            np.array(a.astype(mx.float32))[others], np.array(b.astype(mx.float32))[others]
        )


EXTREMES = {
    "denormal": 1e-41,
    "at 2^-100": 2.0**-100,
    "v at 2^-100": 2.0**-45,  # (1 - beta2) g^2 is then near 2^-100
    "largest that can be squared": 1.8e19,
    "bfloat16's maximum": 3.3895e38,
}


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_gradients_are_defined(bits: int, name: str) -> None:
    """Weights stay finite, a step is never longer than AdamW's, and the rest of the row goes on as it should."""
    value = EXTREMES[name]
    optimizer = AdamW(state_bits=bits)
    w = mx.array(start()).astype(mx.bfloat16)
    state = optimizer.init(w, quantised=True)
    for step in range(1, 6):
        g = np.zeros((ROWS, 64), np.float32)  # most rows are all zero
        g[3] = 1e-3
        g[3, 5], g[4] = value, -value
        before = np.array(master.joined(w, state), np.float64)
        w, state = optimizer.update(w, state, mx.array(g), CHUNK, StepScalars(step, 1e-3))
        moved = np.array(master.joined(w, state), np.float64) - before
        assert np.isfinite(moved).all()
        assert np.abs(moved).max() <= 1.05e-3  # a code's step in a row of 31 octaves is 12 % of v
        assert not moved[[0, 1, 2, *range(5, ROWS)]].any()
        ordinary = np.delete(moved[3], 5)
        if name in ("denormal", "at 2^-100"):  # a neighbour that is next to nothing costs the others nothing
            np.testing.assert_allclose(ordinary, -1e-3, rtol=0.02)
    kept = AdamW(state_bits=32).convert(state, CHUNK, StepScalars(5, 0.0), quantised=True)
    assert not np.isnan(np.array(kept["m"])).any()
    assert (np.array(kept["v"]) >= 0).all()
    if bits == 8:
        assert np.isfinite(np.array(kept["v"])).all()  # the codes' top is 2^120


@pytest.mark.parametrize("bits", [32, 8])
def test_a_step_needs_one_chunk_beside_the_states(bits: int) -> None:
    """Eight chunks, evaluated one after the other, need what one needs: new arrays and one chunk's temporaries."""
    optimizer = AdamW(state_bits=bits)

    def extra(chunks: int) -> int:
        rows = 4096
        parts = []
        for i in range(chunks):
            w = mx.zeros((rows, 64), mx.bfloat16)
            parts.append(
                [w, optimizer.init(w, quantised=True), mx.ones((rows, 64)), ChunkId(1, i * rows, True)]
            )
        mx.eval([part[:3] for part in parts])
        mx.reset_peak_memory()
        held = mx.get_active_memory()
        for part in parts:
            part[:2] = optimizer.update(*part, StepScalars(1, 1e-3))
            mx.eval(part[:2])
        return mx.get_peak_memory() - held

    extra(1)
    one, eight = extra(1), extra(8)
    assert one <= 4096 * 64 * (38 if bits == 8 else 20)
    assert eight <= 1.1 * one


def test_states_convert_between_widths() -> None:
    eight, full = AdamW(state_bits=8), AdamW(state_bits=32)
    w = mx.array(start()).astype(mx.bfloat16)
    state = eight.init(w, quantised=True)
    for step in range(1, 5):
        w, state = eight.update(w, state, mx.array(gradient(step)), CHUNK, StepScalars(step, 1e-3))
    scalars = StepScalars(4, 1e-3)
    assert eight.convert(state, CHUNK, scalars, quantised=True) is state
    decoded = full.convert(state, CHUNK, scalars, quantised=True)
    assert set(decoded) == {"m", "v", "remainder"}
    again = eight.convert(decoded, CHUNK, scalars, quantised=True)
    assert mx.array_equal(again["m_codes"], state["m_codes"]).item()
    v, v_again = (np.array(full.convert(s, CHUNK, scalars, quantised=True)["v"]) for s in (state, again))
    np.testing.assert_allclose(v_again, v, rtol=0.13)
    assert full.convert(decoded, CHUNK, scalars, quantised=True) is decoded
    assert eight.convert(decoded, CHUNK, scalars, quantised=False) is decoded


def test_the_recipe_decides() -> None:
    section = OptimizerSection(
        learning_rate=1e-5,
        weight_decay=0.1,
        betas=[0.9, 0.95],
        eps=1e-6,
        state_bits=8,
        master_weights="exact",
    )
    optimizer = make_optimizer(section)
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay, optimizer.state_bits) == (
        (0.9, 0.95),
        1e-6,
        0.1,
        8,
    )
    lion = make_optimizer(section.model_copy(update={"name": "lion", "master_weights": "diet"}))
    assert isinstance(lion, Lion)
    assert (lion.betas, lion.weight_decay, lion.state_bits, lion.master_weights) == (
        (0.9, 0.95),
        0.1,
        8,
        "diet",
    )
    sgd = make_optimizer(section.model_copy(update={"name": "sgd"}))
    assert isinstance(sgd, Sgd)
    assert (sgd.momentum, sgd.weight_decay, sgd.state_bits) == (0.9, 0.1, 8)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_saved_state_continues_bitwise(bits: int, tmp_path: Path) -> None:
    optimizer = AdamW(state_bits=bits)
    w = mx.array(start()).astype(mx.bfloat16)
    state = optimizer.init(w, quantised=True)
    w, state = optimizer.update(w, state, mx.array(gradient(1)), CHUNK, StepScalars(1, 1e-3))
    mx.save_safetensors(str(tmp_path / "state.safetensors"), {"w": w, **state})
    loaded = mx.load(str(tmp_path / "state.safetensors"))
    loaded_w = loaded.pop("w")
    again = AdamW(state_bits=bits)
    g, scalars = mx.array(gradient(2)), StepScalars(2, 1e-3)
    assert same(
        again.update(loaded_w, loaded, g, CHUNK, scalars), optimizer.update(w, state, g, CHUNK, scalars)
    )
