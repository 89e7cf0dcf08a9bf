"""How a frozen base may be stored packed: MLX's formats, and ternary weights inside one of them.

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
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_empire.model.packing_config import keeps_plain
from mlx_empire.model.spec import TensorSpec, is_router
from mlx_empire.recipe.sections import TuningSection

DEFAULT_BITS = 4
AFFINE = "affine"


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
