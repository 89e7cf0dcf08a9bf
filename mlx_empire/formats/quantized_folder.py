"""A base packed once and for all: a folder in mlx-lm's own layout that `mlx_lm.load` opens.

For bases that mlx-lm's converter does not make (ternary), and for adapters that were trained on a base packed while it
was loaded: they belong to these values. One unit's file at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_empire.formats.hf_folder import INDEX_NAME
from mlx_empire.formats.safetensors import Entry, array_bytes, read_header, write_tensors
from mlx_empire.formats.sidefiles import copy_side_files, stored_config, write_json, write_text
from mlx_empire.formats.source import WeightSource
from mlx_empire.formats.staging import disk_errors, fresh_folder, publish, refuse_foreign
from mlx_empire.model.quantize import QuantFormat, quantize
from mlx_empire.model.spec import ModelSpec, TensorSpec

CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "uint32": "U32", "uint8": "U8"}


def write_packed(
    out: Path, source: WeightSource, spec: ModelSpec, packing: QuantFormat, side_files: Path, card: str = ""
) -> list[str]:
    """Write `out` from a source of the plain model `spec`; returns notes for the user. UserError."""
    refuse_foreign(out)
    temporary = out.parent / f".{out.name}.partial"
    weight_map: dict[str, str] = {}
    with disk_errors(out):
        fresh_folder(temporary)
        for index in range(len(spec.units)):
            name = f"model-{index + 1:05d}-of-{len(spec.units):05d}.safetensors"
            entries = [
                Entry(tensor.name, CODES[tensor.dtype], tuple(array.shape), partial(array_bytes, array))
                for tensor, array in _packed_unit(source, index, packing)
            ]
            size = write_tensors(temporary / name, entries, {"format": "mlx"})
            assert read_header(temporary / name).file_bytes == size
            weight_map |= {entry.name: name for entry in entries}
        write_json(temporary / INDEX_NAME, {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))})
        write_json(temporary / "config.json", packed_config(spec.config, spec.dtype, packing))
        _, notes = copy_side_files(side_files, temporary)
        if card:
            write_text(temporary / "README.md", card)
        publish(temporary, out, "mlx-lm", notes)
    return notes


def packed_config(config: Mapping[str, Any], dtype: str, packing: QuantFormat) -> dict[str, Any]:
    """The configuration as mlx-lm writes it for packed weights; it says nothing of ternary: the codes do."""
    how = {"group_size": packing.group, "bits": packing.bits, "mode": packing.mode}
    return {**stored_config(config, dtype), "quantization": how, "quantization_config": how}


def _packed_unit(
    source: WeightSource, index: int, packing: QuantFormat
) -> Iterator[tuple[TensorSpec, mx.array]]:
    for tensor, array in source.unit(index):
        if tensor.name.endswith(".weight") and packing.packs(tensor.name, tensor.shape, root=index == 0):
            yield from zip(packing.tensors(tensor), quantize(array, packing), strict=True)
        else:
            yield tensor, array.astype(getattr(mx, tensor.dtype))
