"""Quantised bases: in which formats, which modules of a lazily built model hold packed weights, and how one is packed.

| tuning.bits     | MLX's mode | bits | group | bytes per weight (bfloat16 scales) |
|-----------------|------------|------|-------|------------------------------------|
| 8, 6, 4, 3, 2   | affine     | same | 64    | bits / 8 + 1 / 16                  |
| ternary         | affine     | 2    | 64    | 0.3125: -s, 0 or +s, log2(3) = 1.58 bits of information |
| mxfp8           | mxfp8      | 8    | 32    | 1.03                               |
| mxfp4           | mxfp4      | 4    | 32    | 0.53                               |
| nvfp4           | nvfp4      | 4    | 16    | 0.56                               |

Only matrices of at least two dimensions whose inputs are whole groups are packed, never a mixture's router, whose
choices are fragile; of a ternary base embedding and head stay as they are too, as in BitNet b1.58. A folder that is
stored packed says in its `quantization` how, also for single modules, and that holds.

Bases stored packed in MLX's own formats are taken as they are. Nothing is evaluated here but in `quantize`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_empire.errors import UserError
from mlx_empire.model.bitnet import two_bit_words
from mlx_empire.model.build import find_layers, foreign
from mlx_empire.model.packing_config import (
    QUANTISATION_KEYS,
    foreign_packing,
    keeps_plain,
    packing_method,
)
from mlx_empire.model.spec import TensorSpec, is_router
from mlx_empire.recipe.sections import TuningSection

DEFAULT_BITS = 4
AFFINE = "affine"
# Codes, and by what they are multiplied and shifted; some have no last.
PACKED_PARTS = ("weight", "scales", "biases")


@dataclass(frozen=True)
class QuantFormat:
    """MLX's mode, bits of a code, inputs that share a scale, and whether the codes are of three values only."""

    mode: str
    bits: int
    group: int
    ternary: bool = False

    @property
    def has_biases(self) -> bool:
        """Whether a group has a bias beside its scale."""
        return self.mode == AFFINE

    def packs(self, name: str, shape: tuple[int, ...], *, root: bool) -> bool:
        """Whether the matrix `name` (a weight's path) of `shape` is packed; `root`: it belongs to no layer."""
        if len(shape) < 2 or shape[-1] % self.group or is_router(name):
            return False
        return not (root and self.ternary)

    def tensors(self, matrix: TensorSpec) -> Iterator[TensorSpec]:
        """What becomes of a matrix (.., outputs, inputs): its codes, scales and perhaps biases."""
        *rows, inputs = matrix.shape
        stem = matrix.name.removesuffix(".weight")
        columns = inputs * self.bits // 32
        yield TensorSpec(matrix.name, (*rows, columns), "uint32", False, bits=self.bits)
        scales = (*rows, inputs // self.group)
        dtype = matrix.dtype if self.has_biases else "uint8"
        yield TensorSpec(f"{stem}.scales", scales, dtype, False, group=self.group)
        if self.has_biases:
            yield TensorSpec(f"{stem}.biases", scales, dtype, False, group=self.group)


QUANT_FORMATS: dict[int | str, QuantFormat] = {
    **{bits: QuantFormat(AFFINE, bits, 64) for bits in (2, 3, 4, 6, 8)},
    "ternary": QuantFormat(AFFINE, 2, 64, ternary=True),
    "mxfp4": QuantFormat("mxfp4", 4, 32),
    "mxfp8": QuantFormat("mxfp8", 8, 32),
    "nvfp4": QuantFormat("nvfp4", 4, 16),
}
MODES = (AFFINE, "mxfp4", "mxfp8", "nvfp4")


def quant_format_of(tuning: TuningSection) -> QuantFormat | None:
    """How QLoRA packs the base while loading it; None where it stays as it is."""
    if tuning.type != "qlora":
        return None
    return QUANT_FORMATS[DEFAULT_BITS if tuning.bits is None else tuning.bits]


Choice = Callable[[TensorSpec, bool], QuantFormat | None]  # of a matrix and whether it belongs to the root


def uniformly(packing: QuantFormat | None) -> Choice:
    """Every matrix that `packing` can pack."""

    def choose(matrix: TensorSpec, root: bool) -> QuantFormat | None:
        return packing if packing and packing.packs(matrix.name, matrix.shape, root=root) else None

    return choose


def as_stored(config: Mapping[str, Any]) -> Choice:
    """What a folder's `quantization` says: settings for all, and by a module's path its own or false.

    Where another tool packed, the modules that it left out stay plain.
    """
    quantization: Mapping[str, Any] = config["quantization"]
    otherwise = uniformly(stored_quant_format(quantization))

    def choose(matrix: TensorSpec, root: bool) -> QuantFormat | None:
        path = matrix.name.removesuffix(".weight")
        own = quantization.get(path)
        if isinstance(own, Mapping):
            return stored_quant_format(own)
        return None if own is False or keeps_plain(config, path) else otherwise(matrix, root)

    return choose


def quant_format_with(bits: int, group: int, *, has_biases: bool) -> QuantFormat:
    """The format of a packed tensor by its numbers: of MLX's floating-point ones each has its own."""
    if has_biases:
        return QuantFormat(AFFINE, bits, group)
    return next(f for f in QUANT_FORMATS.values() if (f.bits, f.group, f.has_biases) == (bits, group, False))


def stored_quant_format(settings: Mapping[str, Any]) -> QuantFormat:
    """The packing of a folder's `settings`, or of a module's own: what is left out is as MLX has it, hence affine."""
    mode = str(settings.get("mode", AFFINE))
    usual = QUANT_FORMATS.get(DEFAULT_BITS if mode == AFFINE else mode, QUANT_FORMATS[DEFAULT_BITS])
    return QuantFormat(
        mode, int(settings.get("bits", usual.bits)), int(settings.get("group_size", usual.group))
    )


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
    """UserError for what cannot be done on a base that is stored packed: other `tuning.bits`."""
    found = stored_quantization(config, tuning, name)
    if found is None:
        return
    mode = found.get("mode", AFFINE)
    bits = stored_quant_format(found).bits if mode == AFFINE else mode
    if tuning.bits is not None and tuning.bits != bits:
        how = f"in {bits} bits" if mode == AFFINE else f"as {mode}"
        raise UserError(f"tuning.bits: {tuning.bits}: {name} is stored {how}; leave tuning.bits out")


def unpacked_matrix(parts: Mapping[str, mx.array], bits: int, group: int) -> mx.array:
    """The matrix of a packed one's `PACKED_PARTS`, lazily; floating-point modes are told by `bits` and `group`."""
    codes, scales, biases = (parts.get(name) for name in PACKED_PARTS)
    assert codes is not None
    assert scales is not None
    floating = (
        f.mode for f in QUANT_FORMATS.values() if (f.bits, f.group) == (bits, group) and not f.has_biases
    )
    mode = next(floating) if biases is None else AFFINE
    return mx.dequantize(codes, scales, biases, group, bits, mode)


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

    from mlx_lm.utils import infer_quant_config  # imports transformers: only for stored packed weights

    packing = stored_quant_format(quantisation)
    with foreign(f"{name}: mlx-lm cannot put its packed weights into the model"):
        nn.quantize(model, packing.group, packing.bits, mode=packing.mode, class_predicate=settings)


def refuse_unread(
    model: nn.Module, tensors: Mapping[str, mx.array], config: Mapping[str, Any], name: str
) -> None:
    """UserError where another tool packed the weights and mlx-lm's `sanitize` left them so: the family's does not know
    this method. `tensors`: as in `quantize_as_stored`; `config`: with what it says of packing.
    """
    if not config.get("quantization_config") or packing_method(config) == "MLX":
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
    -1, 0 or 1 (absmean quantisation, BitNet b1.58, arXiv:2402.17764). A group of zeros has s = 0. A group that is
    ternary already stays as it is: s is then its largest absolute value.
    """
    *rows, inputs = array.shape
    weights = array.astype(mx.float32).reshape(*rows, inputs // group, group)
    sizes = mx.abs(weights)
    largest = mx.max(sizes, axis=-1, keepdims=True)
    is_ternary = mx.all((sizes == 0) | (sizes == largest), axis=-1)
    scales = mx.where(is_ternary, largest[..., 0], mx.mean(sizes, axis=-1)).astype(array.dtype)
    signs = absmean_codes(weights, scales.astype(mx.float32)[..., None])
    return two_bit_words((signs + 1).reshape(*rows, inputs)), scales, -scales


def absmean_codes(groups: mx.array, means: mx.array) -> mx.array:
    """-1, 0 or 1 for each of `groups` (.., group), by `means` (.., 1) of the groups' absolute values; float32."""
    return mx.clip(mx.round(groups / mx.where(means > 0, means, 1.0)), -1, 1)
