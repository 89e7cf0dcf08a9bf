"""A base converted: with its adapter added in, or packed once and for all.

Added in, plain weights give the same logits without any adapter. Decides that a base which was packed while it was
loaded is packed and unpacked here too, because the adapter was trained on those values, and that sums are rounded
once, to the base's dtype. One tensor at a time.

Packed, it is a folder in mlx-lm's own layout that `mlx_lm.load` opens. For bases that mlx-lm's converter does not
make (ternary), and for adapters that were trained on a base packed while it was loaded: they belong to these values.
One unit's file at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_empire.errors import UserError
from mlx_empire.formats.adapter_folder import Adapter
from mlx_empire.formats.hf_folder import INDEX_NAME
from mlx_empire.formats.safetensors import Entry, array_bytes, read_header, write_tensors
from mlx_empire.formats.source import WeightSource
from mlx_empire.formats.staging import (
    copy_side_files,
    disk_errors,
    fresh_folder,
    publish,
    refuse_foreign,
    stored_config,
    write_json,
    write_text,
)
from mlx_empire.model.quantize import QuantFormat, quantize
from mlx_empire.model.spec import ModelSpec, TensorSpec, is_embedding


class MergedSource:
    """A `WeightSource` of the plain model `spec` over `base`, a source of the same, with `adapter` added in.

    UserError if the adapter is of another model.
    """

    def __init__(
        self, base: WeightSource, spec: ModelSpec, adapter: Adapter, packing: QuantFormat | None, where: str
    ) -> None:
        self._base, self._spec, self._adapter, self._packing = base, spec, adapter, packing
        stems = {t.name.removesuffix(".weight") for u in spec.units for t in u.tensors}
        foreign = sorted(n for n in adapter.weights if n.rpartition(".")[0] not in stems)
        if foreign:
            raise UserError(f"{where}: it adapts {foreign[0]}, which {spec.name} does not have")

    def unit(self, index: int) -> Iterator[tuple[TensorSpec, mx.array]]:
        """See `WeightSource.unit`."""
        for tensor, array in self._base.unit(index):
            yield tensor, self._merged(tensor, array, root=index == 0)

    def _merged(self, tensor: TensorSpec, array: mx.array, *, root: bool) -> mx.array:
        if not tensor.name.endswith(".weight"):
            return array
        dtype = array.dtype
        if self._packing and self._packing.packs(tensor.name, tensor.shape, root=root):
            array = unpack(quantize(array, self._packing), self._packing).astype(dtype)
        stem = tensor.name.removesuffix(".weight")
        if f"{stem}.lora_a" in self._adapter.weights:
            embedding = root and is_embedding(stem)
            array = added(
                array, self._adapter.weights, stem, self._adapter.settings.scale, embedding=embedding
            )
        array = array.astype(dtype)
        mx.eval(array)
        return array


def unpack(packed: tuple[mx.array, ...], packing: QuantFormat) -> mx.array:
    """The values that `pack`'s result stands for."""
    codes, scales, *biases = packed
    bias = biases[0] if biases else None
    return mx.dequantize(codes, scales, bias, group_size=packing.group, bits=packing.bits, mode=packing.mode)


def added(
    weight: mx.array, adapter: Mapping[str, mx.array], stem: str, scale: float, *, embedding: bool
) -> mx.array:
    """W + scale x B A in float32 (LoRA, arXiv:2106.09685); with a magnitude m, m x that / its rows' norms (DoRA,
    arXiv:2402.09353). `weight` is (outputs, inputs), for stacked experts (experts, outputs, inputs).
    """
    a, b = (adapter[f"{stem}.{leaf}"].astype(mx.float32) for leaf in ("lora_a", "lora_b"))
    stacked = weight.ndim == 3
    update = b @ a if stacked else a @ b if embedding else (a @ b).T
    total = weight.astype(mx.float32) + scale * update
    if f"{stem}.m" in adapter:
        total = total * (adapter[f"{stem}.m"] / mx.linalg.norm(total, axis=-1))[:, None]
    return total


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
