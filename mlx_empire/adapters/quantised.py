"""Quantised bases: which modules of a lazily built model hold packed weights, and how a tensor is packed.

Decides what QLoRA packs (every matrix that MLX can pack but a mixture's router, whose choices are fragile) and that
of bases stored packed those in MLX's affine format are taken as they are. Nothing is evaluated here but in `pack`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_empire.errors import UserError
from mlx_empire.plan.model import QUANTISED_GROUP, is_router
from mlx_empire.recipe.schema import TuningSection

QUANTISATION_KEYS = ("quantization", "quantization_config")


def stored_quantisation(
    config: Mapping[str, Any], tuning: TuningSection, name: str
) -> Mapping[str, Any] | None:
    """How a folder's configuration says its weights are packed, where adapters can be trained on them; else None.

    UserError for what cannot be: another format than MLX's affine one, other `tuning.bits`, DoRA.
    """
    found = config.get("quantization")
    if tuning.type == "full" or not isinstance(found, Mapping):
        return None  # a full fine-tuning of packed weights is refused where the model is built
    mode = found.get("mode", "affine")
    if mode != "affine":
        raise UserError(
            f"{name}: its weights are packed as {mode}; only affine ones are built; use another folder"
        )
    if tuning.type == "dora":
        raise UserError(
            f"tuning.type: dora: {name} is stored quantised; use type lora, or a folder that is not"
        )
    bits = found.get("bits")
    if tuning.bits is not None and tuning.bits != bits:
        raise UserError(f"tuning.bits: {tuning.bits}: {name} is stored in {bits} bits; leave tuning.bits out")
    return found


def unpacked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the same model with plain weights."""
    return {key: value for key, value in config.items() if key not in QUANTISATION_KEYS}


def quantise_as_stored(model: nn.Module, quantisation: Mapping[str, Any], names: Collection[str]) -> None:
    """Put mlx-lm's quantised modules where the folder (tensor `names`) has scales, with each module's own settings."""

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in names:
            return False
        own = quantisation.get(path)
        return dict(own) if isinstance(own, Mapping) else True

    nn.quantize(model, quantisation["group_size"], quantisation["bits"], class_predicate=settings)


def quantise(model: nn.Module, bits: int | None) -> None:
    """Put quantised modules in the place of those whose weights are packed while they are loaded (QLoRA)."""
    nn.quantize(model, QUANTISED_GROUP, bits, class_predicate=_packs)


def pack(array: mx.array, columns: int, groups: int) -> tuple[mx.array, mx.array, mx.array]:
    """(codes, scales, biases) of a matrix in MLX's affine format, evaluated.

    `columns` of uint32 for each row and `groups` of inputs that share a scale say how many bits and how large a group.
    """
    inputs = array.shape[-1]
    codes, scales, biases = mx.quantize(array, inputs // groups, columns * 32 // inputs)
    mx.eval(codes, scales, biases)
    return codes, scales, biases


def _packs(path: str, module: nn.Module) -> bool:
    if not hasattr(module, "to_quantized") or is_router(f"{path}.weight"):
        return False
    return bool(module.weight.ndim >= 2 and module.weight.shape[-1] % QUANTISED_GROUP == 0)
