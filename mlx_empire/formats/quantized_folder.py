"""A base packed once and for all: a folder in mlx-lm's own layout that `mlx_lm.load` opens.

For bases that mlx-lm's converter does not make (ternary), and for adapters that were trained on a base packed while it
was loaded: they belong to these values. One unit's file at a time.
"""

from __future__ import annotations

from collections import Counter
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
from mlx_empire.model.quant_format import Choice, QuantFormat
from mlx_empire.model.quantize import quantize
from mlx_empire.model.spec import ModelSpec, TensorSpec

CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "uint32": "U32", "uint8": "U8"}


def write_packed(
    out: Path, source: WeightSource, spec: ModelSpec, choose: Choice, side_files: Path, card: str = ""
) -> list[str]:
    """Write `out` from a source of the plain model `spec`; returns notes for the user. UserError.

    `choose`: how each matrix is packed, if it is.
    """
    refuse_foreign(out)
    temporary = out.parent / f".{out.name}.partial"
    weight_map: dict[str, str] = {}
    chosen: dict[str, QuantFormat] = {}
    with disk_errors(out):
        fresh_folder(temporary)
        for index in range(len(spec.units)):
            name = f"model-{index + 1:05d}-of-{len(spec.units):05d}.safetensors"
            entries = [
                Entry(tensor.name, CODES[tensor.dtype], tuple(array.shape), partial(array_bytes, array))
                for tensor, array in _packed_unit(source, index, choose, chosen)
            ]
            size = write_tensors(temporary / name, entries, {"format": "mlx"})
            assert read_header(temporary / name).file_bytes == size
            weight_map |= {entry.name: name for entry in entries}
        write_json(temporary / INDEX_NAME, {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))})
        write_json(temporary / "config.json", packed_config(spec.config, spec.dtype, chosen))
        _, notes = copy_side_files(side_files, temporary)
        if card:
            write_text(temporary / "README.md", card)
        publish(temporary, out, "mlx-lm", notes)
    return notes


def packed_config(config: Mapping[str, Any], dtype: str, chosen: Mapping[str, QuantFormat]) -> dict[str, Any]:
    """The configuration as mlx-lm writes it for packed weights; it says nothing of ternary: the codes do.

    `chosen`: the packing of each packed module; that of most is said once, and of the others by their names.
    """
    settings = {p: {"group_size": f.group, "bits": f.bits, "mode": f.mode} for p, f in chosen.items()}
    usual = Counter(tuple(found.items()) for found in settings.values()).most_common(1)
    how: dict[str, Any] = dict(usual[0][0]) if usual else {}
    how |= {path: found for path, found in settings.items() if found != how}
    return {**stored_config(config, dtype), "quantization": how, "quantization_config": how}


def _packed_unit(
    source: WeightSource, index: int, choose: Choice, chosen: dict[str, QuantFormat]
) -> Iterator[tuple[TensorSpec, mx.array]]:
    for tensor, array in source.unit(index):
        packing = choose(tensor, index == 0) if tensor.name.endswith(".weight") else None
        if packing is not None:
            chosen[tensor.name.removesuffix(".weight")] = packing
            yield from zip(packing.tensors(tensor), quantize(array, packing), strict=True)
        else:
            yield tensor, array.astype(getattr(mx, tensor.dtype))
