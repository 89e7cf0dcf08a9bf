"""BitNet's packed layout: of a matrix (outputs, inputs) in {-s, 0, s} four codes a byte, and one scale s.

As mlx-lm's `bitlinear_layers` and transformers read it: byte (r, i) of (outputs / 4, inputs) holds input i of the rows
r, r + outputs / 4 and so on, two bits each, the first in the lowest; a code less 1 is -1, 0 or 1. mlx-lm's own module
is a Metal kernel that nothing can be differentiated through. So its modules become plain linear ones here, and what is
stored becomes MLX's affine format of 2 bits while it is read: the same values, on which adapters train as on any packed
base. It takes 2.5 bits a weight with bfloat16 scales, not 2. As in mlx-lm, inputs are not rounded to 8 bits, which
transformers does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from mlx_empire.errors import UserError
from mlx_empire.model.packing_config import BITNET_NAME

ROWS_PER_BYTE, GROUP = 4, 64
SCALE = ".weight_scale"
CODES_PER_WORD = 16  # of two bits each, in one of MLX's uint32
# What a folder in this layout says in `quantization_config`: scales are multiplied with, weights are packed.
SETTINGS: Mapping[str, Any] = {
    "quant_method": BITNET_NAME,
    "linear_class": "autobitlinear",
    "quantization_mode": "offline",
}


def pack(signs: mx.array) -> mx.array:
    """-1, 0 and 1 (outputs, inputs) as bytes (outputs / 4, inputs); outputs are a multiple of 4."""
    outputs, inputs = signs.shape
    codes = (signs + 1).astype(mx.uint8).reshape(ROWS_PER_BYTE, outputs // ROWS_PER_BYTE, inputs)
    return mx.sum(codes << _shifts(), axis=0).astype(mx.uint8)


def _shifts() -> mx.array:
    return mx.arange(0, 2 * ROWS_PER_BYTE, 2, dtype=mx.uint8)[:, None, None]


def two_bit_words(codes: mx.array) -> mx.array:
    """Codes from 0 to 3 (.., inputs) as MLX's uint32 words of 2 bits (.., inputs / 16), the first one lowest."""
    *rows, inputs = codes.shape
    wide = codes.astype(mx.uint32).reshape(*rows, inputs // CODES_PER_WORD, CODES_PER_WORD)
    places = mx.arange(0, 2 * CODES_PER_WORD, 2, dtype=mx.uint32)
    return mx.sum(wide << places, axis=-1).astype(mx.uint32)


def as_affine(packed: mx.array, scale: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """(codes uint32, scales, biases) of MLX's affine format, 2 bits in groups of 64, from bytes and s (1,); lazily."""
    inputs = packed.shape[-1]
    words = two_bit_words(((packed[None] >> _shifts()) & 3).reshape(-1, inputs))
    scales = mx.broadcast_to(scale.reshape(1, 1), (len(words), inputs // GROUP))
    return words, scales, -scales


def spell_packed(stored: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """A folder's tensors with BitNet's matrices in MLX's affine format; all others as they are. UserError."""
    found = dict(stored)
    for name in stored:
        if not name.endswith(SCALE):
            continue
        stem = name.removesuffix(SCALE)
        packed, scale = found.pop(f"{stem}.weight", None), found.pop(name)
        if packed is None or packed.dtype != mx.uint8 or packed.ndim != 2 or packed.shape[1] % GROUP:
            raise UserError(
                f"{name}: BitNet's packed weight beside it is missing, or has no whole groups of {GROUP} inputs"
            )
        parts = zip(("weight", "scales", "biases"), as_affine(packed, scale), strict=True)
        found |= {f"{stem}.{leaf}": array for leaf, array in parts}
    return found


def with_plain_linears(model: nn.Module) -> nn.Module:
    """The model with mlx-lm's BitLinear modules as linear ones, lazily, in place; another model is left alone."""
    from mlx_lm.models.bitlinear_layers import BitLinear  # builds a Metal kernel's text: only for this family

    def plain(_: str, module: nn.Module) -> nn.Module:
        if not isinstance(module, BitLinear):
            return module
        return nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)

    model.update_modules(tree_map_with_path(plain, model.leaf_modules(), is_leaf=nn.Module.is_module))
    return model
