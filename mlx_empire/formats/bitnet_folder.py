"""A model trained as ternary in BitNet's packed layout, which mlx-lm opens with its own BitLinear modules.

Decides which matrices go into it: those of the layers' linear modules that are -s, 0 and s with one s for the whole
matrix (`tuning.qat_group: matrix`). All others stay plain and are listed in `modules_to_not_convert`, as mlx-lm's
`bitnet_quantize` reads it. Nothing is rounded here: what is stored are the values that were there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_empire.errors import UserError
from mlx_empire.formats.convert import write_units
from mlx_empire.formats.packing_table import PackingTable
from mlx_empire.formats.source import WeightSource
from mlx_empire.formats.staging import stored_config
from mlx_empire.model.bitnet import GROUP, ROWS_PER_BYTE, SETTINGS, pack
from mlx_empire.model.spec import TensorSpec
from mlx_empire.model.target import Target


def write_bitnet(
    out: Path, source: WeightSource, plain: Target, side_files: Path, card: str = ""
) -> list[str]:
    """Write `out` from a source of the plain model; returns notes for the user. UserError where nothing is packed."""
    spec, table = plain.spec, PackingTable()
    linear = {path for path, module in plain.rebuild().named_modules() if isinstance(module, nn.Linear)}
    packed: set[str] = set()

    def unit(index: int) -> Iterator[tuple[TensorSpec, mx.array]]:
        for tensor, array in source.unit(index):
            stem = tensor.name.removesuffix(".weight")
            scale = _scale_of(array) if index and stem in linear and tensor.name != stem else None
            if scale is None:
                yield tensor, array.astype(getattr(mx, tensor.dtype))
                continue
            codes = pack(mx.sign(array))
            mx.eval(codes)
            scale = scale.astype(getattr(mx, tensor.dtype))
            table.add(spec.units[index].name, stem, array, array, codes.nbytes + scale.nbytes)
            packed.add(stem)
            yield TensorSpec(tensor.name, tuple(codes.shape), "uint8", False), codes
            yield TensorSpec(f"{stem}.weight_scale", (1,), tensor.dtype, False), scale

    def config() -> dict[str, object]:
        if not packed:
            raise UserError(
                f"{side_files}: no matrix of its layers is ternary with one scale, as BitNet's layout wants it; train "
                "with tuning.qat: ternary and tuning.qat_group: matrix (groups of 64: export base --bits ternary)"
            )
        how = {**SETTINGS, "modules_to_not_convert": sorted(linear - packed)}
        return {**stored_config(spec.config, spec.dtype), "quantization_config": how}

    notes = write_units(out, unit, len(spec.units), config, side_files, card, table=table)
    return [*notes, table.sentence()]


def _scale_of(weight: mx.array) -> mx.array | None:
    """(1,): s of a matrix (outputs, inputs) of -s, 0 and s that BitNet's layout can hold; None of another one."""
    if weight.ndim != 2 or weight.shape[0] % ROWS_PER_BYTE or weight.shape[1] % GROUP:
        return None
    sizes = mx.abs(weight)
    largest = mx.max(sizes)
    is_ternary = mx.all((sizes == 0) | (sizes == largest)).item()
    return largest.reshape(1) if is_ternary else None
