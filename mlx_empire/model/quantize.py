"""Quantised bases: which modules of a lazily built model hold packed weights, and how a tensor is packed.

Decides that of bases stored packed MLX's own formats are taken as they are. What QLoRA packs, and in which formats,
stands in model/quant_format.py. Nothing is evaluated here but in `quantize`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import infer_quant_config

from mlx_empire.errors import UserError
from mlx_empire.model.build import find_layers
from mlx_empire.model.foreign import foreign
from mlx_empire.model.packing_config import QUANTISATION_KEYS, foreign_packing
from mlx_empire.model.quant_format import AFFINE, MODES, Choice, QuantFormat, stored_quant_format
from mlx_empire.model.spec import TensorSpec
from mlx_empire.recipe.sections import TuningSection

CODES_PER_WORD = 16  # ternary codes, of two bits each, in one uint32


def stored_quantization(
    config: Mapping[str, Any], tuning: TuningSection, name: str
) -> Mapping[str, Any] | None:
    """How a folder's configuration says its weights are packed, where adapters can be trained on them; else None.

    UserError for a mode that is not MLX's.
    """
    found = config.get("quantization")
    if tuning.type == "full" or not isinstance(found, Mapping):
        return None  # a full fine-tuning of packed weights is refused where the model is built
    mode = found.get("mode", AFFINE)
    if mode not in MODES:
        raise UserError(
            f"{name}: its weights are packed as {mode}; {', '.join(MODES)} are built; use another folder"
        )
    return found


def refuse_other_packing(config: Mapping[str, Any], tuning: TuningSection, name: str) -> None:
    """UserError for what cannot be done on a base that is stored packed: other `tuning.bits`, DoRA."""
    found = stored_quantization(config, tuning, name)
    if found is None:
        return
    if tuning.type == "dora":
        raise UserError(
            f"tuning.type: dora: {name} is stored quantised; use type lora, or a folder that is not"
        )
    mode = found.get("mode", AFFINE)
    bits = stored_quant_format(found).bits if mode == AFFINE else mode
    if tuning.bits is not None and tuning.bits != bits:
        how = f"in {bits} bits" if mode == AFFINE else f"as {mode}"
        raise UserError(f"tuning.bits: {tuning.bits}: {name} is stored {how}; leave tuning.bits out")


def unpacked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the same model with plain weights."""
    plain = {key: value for key, value in config.items() if key not in QUANTISATION_KEYS}
    if isinstance(text := plain.get("text_config"), Mapping):
        plain["text_config"] = {key: value for key, value in text.items() if key not in QUANTISATION_KEYS}
    return plain


def quantize_as_stored(
    model: nn.Module, quantisation: Mapping[str, Any], tensors: dict[str, mx.array], name: str
) -> None:
    """Put mlx-lm's quantised modules where the folder has scales: a module's own settings, else what its tensors show.

    `tensors`: the folder's, by mlx-lm's names; only shapes and dtypes are looked at. UserError for a packing that
    cannot be told from them.
    """

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in tensors:
            return False
        own = quantisation.get(path)
        if isinstance(own, Mapping):
            return dict(own)
        found: dict[str, Any] = infer_quant_config(path, module, tensors)
        if f"{path}.global_scale" in tensors and isinstance(module, SwitchLinear):
            found["global_scale"] = True
        return found

    packing = stored_quant_format(quantisation)
    with foreign(f"{name}: mlx-lm cannot put its packed weights into the model"):
        nn.quantize(model, packing.group, packing.bits, mode=packing.mode, class_predicate=settings)


def refuse_unread(
    model: nn.Module, tensors: Mapping[str, mx.array], config: Mapping[str, Any], name: str
) -> None:
    """UserError where another tool packed the weights and mlx-lm's `sanitize` left them so: the family's does not know
    this method. `tensors`: as in `quantize_as_stored`; `config`: with what it says of packing.
    """
    if not config.get("quantization_config"):
        return
    for path, array in tree_flatten(model.parameters()):
        found = tensors.get(path)
        floating = found is not None and mx.issubdtype(found.dtype, mx.floating)
        if found is None or (mx.issubdtype(array.dtype, mx.floating) and not floating):
            raise UserError(foreign_packing(config, name))


def quantize_modules(model: nn.Module, choose: Choice, name: str) -> None:
    """Put quantised modules in the place of those whose matrices are to be packed while they are loaded."""
    _, _, prefix = find_layers(model, name)

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized"):
            return False
        matrix = TensorSpec(f"{path}.weight", tuple(module.weight.shape), "float32")
        packing = choose(matrix, not path.startswith(f"{prefix}."))
        return packing is not None and {
            "group_size": packing.group,
            "bits": packing.bits,
            "mode": packing.mode,
        }

    nn.quantize(model, class_predicate=settings)


def quantize(array: mx.array, packing: QuantFormat) -> tuple[mx.array, ...]:
    """(codes, scales, and for affine packing biases) of a matrix (.., outputs, inputs), evaluated."""
    if packing.ternary:
        packed: tuple[mx.array, ...] = ternary(array, packing.group)
    else:
        packed = tuple(mx.quantize(array, packing.group, packing.bits, mode=packing.mode))
    mx.eval(packed)
    return packed


def ternary(array: mx.array, group: int) -> tuple[mx.array, mx.array, mx.array]:
    """(codes, scales, biases) of weights in {-s, 0, +s} as MLX's affine format of 2 bits: s x code - s, code 0, 1, 2.

    s is the mean of a group's absolute values, rounded to the array's dtype; a weight becomes round(w / s) cut to
    -1, 0 or 1 (absmean quantisation, BitNet b1.58, arXiv:2402.17764). A group of zeros has s = 0.
    """
    *rows, inputs = array.shape
    weights = array.astype(mx.float32).reshape(*rows, inputs // group, group)
    scales = mx.mean(mx.abs(weights), axis=-1).astype(array.dtype)
    step = scales.astype(mx.float32)[..., None]
    signs = mx.clip(mx.round(weights / mx.where(step > 0, step, 1.0)), -1, 1)
    codes = (signs + 1).astype(mx.uint32).reshape(*rows, inputs // CODES_PER_WORD, CODES_PER_WORD)
    shifts = mx.arange(0, 2 * CODES_PER_WORD, 2, dtype=mx.uint32)
    return mx.sum(codes << shifts, axis=-1).astype(mx.uint32), scales, -scales
