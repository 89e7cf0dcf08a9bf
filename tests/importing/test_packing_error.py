"""What packing costs: NF4 with double quantisation and groups of 4 bits, beside plain loops and what is published."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_empire.importing.packing_error import dynamic_levels, nf4, nf4_levels, packing_error

# Published with bitsandbytes: what NF4's formula must give.
PUBLISHED = """-1.0 -0.6961928 -0.5250731 -0.3949175 -0.2844414 -0.1847734 -0.0910500 0.0 0.0795803 0.1609302 0.2461123
0.3379152 0.4407098 0.5626170 0.7229568 1.0"""


def test_nf4_s_levels_are_those_that_are_published() -> None:
    assert np.allclose(nf4_levels(), [float(one) for one in PUBLISHED.split()], atol=1e-6)
    levels = dynamic_levels()
    assert len(levels) == len(set(levels)) == 256
    assert np.allclose(levels[-3:], [0.97890625, 0.99296875, 1.0])


def test_both_errors_are_what_a_plain_loop_finds(tmp_path: Path) -> None:
    """Of one matrix, block by block and weight by weight in float64."""
    rng = np.random.default_rng(7)
    weights = rng.standard_normal((4, 128)).astype(np.float32)
    (tmp_path / "config.json").write_text("{}")
    heads = (
        "lm_head.weight",
        "embed_out.weight",
        "language_model.lm_head.weight",
    )  # both leave these as they are
    arrays = {name: mx.ones((4, 64)) for name in (*heads, "model.embed_tokens.weight")}
    arrays["model.layers.0.mlp.up_proj.weight"] = mx.array(weights)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays)
    blocks = weights.astype(np.float64).reshape(-1, 64)
    constants = [max(abs(w) for w in block) for block in blocks]
    mean = sum(constants) / len(constants)
    largest = max(abs(a - mean) for a in constants)
    codes = dynamic_levels().astype(np.float64)
    kept = [mean + largest * min(codes, key=lambda d, a=a: abs((a - mean) / largest - d)) for a in constants]
    levels = [float(one) for one in PUBLISHED.split()]
    expected = [
        [a * min(levels, key=lambda c, w=w, a=a: abs(w / a - c)) for w in block]
        for block, a in zip(blocks, kept, strict=True)
    ]
    assert np.allclose(nf4(weights).reshape(-1, 64), expected, atol=1e-4)
    grouped = []  # affine: 16 even steps from the least weight to the greatest, within MLX's choice of a zero
    for block in blocks:
        packed = mx.quantize(mx.array(block.astype(np.float32))[None], 64, 4)
        grouped.append(np.abs(np.array(mx.dequantize(*packed, 64, 4)[0]) - block))
        assert grouped[-1].max() <= 1.01 * (block.max() - block.min()) / 15
    found = packing_error(tmp_path)
    total = np.sqrt((blocks**2).sum())
    assert found.nf4 == pytest.approx(np.sqrt(((np.array(expected) - blocks) ** 2).sum()) / total, rel=1e-4)
    assert found.groups == pytest.approx(np.sqrt((np.array(grouped) ** 2).sum()) / total, rel=1e-4)
    assert str(tmp_path) in found.where
