"""A base converted: with its adapter added in, or packed once and for all.

Added in, plain weights give the same logits without any adapter. Decides that a base which was packed while it was
loaded is packed and unpacked here too, because the adapter was trained on those values; that one which is stored packed
is unpacked, because most of an adapter is smaller than a step of its codes and would be lost in them; and that sums are
rounded once, to the base's dtype. One tensor at a time.

Packed, it is a folder in mlx-lm's own layout that `mlx_lm.load` opens. For bases that mlx-lm's converter does not
make (ternary), and for adapters that were trained on a base packed while it was loaded: they belong to these values.
One unit's file at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx

from mlx_empire.errors import UserError
from mlx_empire.formats.adapter_folder import Adapter
from mlx_empire.formats.hf_folder import INDEX_NAME, open_folder
from mlx_empire.formats.packing_table import TABLE_NAME, PackingTable
from mlx_empire.formats.safetensors import Entry, array_bytes, read_header, write_tensors
from mlx_empire.formats.source import FolderSource, WeightSource
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
from mlx_empire.model.config import read_config
from mlx_empire.model.packing_config import BITNET_NAME
from mlx_empire.model.quantize import Choice, QuantFormat, quant_format_with, quantize
from mlx_empire.model.spec import ModelSpec, TensorSpec, is_embedding
from mlx_empire.model.target import Target, make_target
from mlx_empire.recipe.sections import TuningSection


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


class UnpackedSource:
    """A `WeightSource` of the plain model `spec` over `base`, a source of the same model stored packed.

    What was packed comes in float32, which holds every value exactly.
    """

    def __init__(self, base: WeightSource, spec: ModelSpec) -> None:
        self._base, self._spec = base, spec

    def unit(self, index: int) -> Iterator[tuple[TensorSpec, mx.array]]:
        """See `WeightSource.unit`; the packed unit is held, and one tensor beside it."""
        packed = {tensor.name: (tensor, array) for tensor, array in self._base.unit(index)}
        for wanted in self._spec.units[index].tensors:
            tensor, array = packed.pop(wanted.name)
            if tensor.bits:
                stem = wanted.name.removesuffix(".weight")
                parts = {
                    leaf: packed.pop(f"{stem}.{leaf}", None) for leaf in ("scales", "biases", "global_scale")
                }
                array = _unpacked(
                    tensor, array, {leaf: part for leaf, part in parts.items() if part is not None}
                )
            yield wanted, array


def plain_weights(folder: Path, plain: Target) -> WeightSource:
    """The weights of a folder as those of the plain model, however they are stored. UserError."""
    if not read_config(folder).get("quantization"):
        return FolderSource(folder, plain.rebuild, plain.spec)
    packed = _as_stored(folder, plain)
    return UnpackedSource(FolderSource(folder, packed.rebuild, packed.base), plain.spec)


def packed_as_stored(folder: Path, plain: Target) -> Choice:
    """The packing of a packed folder's own matrices. UserError where it is not packed."""
    if not read_config(folder).get("quantization"):
        raise UserError(f"--pack: stored: {folder} is not stored packed; say a number of bits or a format")
    groups: dict[str, dict[str, int]] = {}
    codes: dict[str, int] = {}
    for tensor in (t for unit in _as_stored(folder, plain).base.units for t in unit.tensors):
        stem, _, leaf = tensor.name.rpartition(".")
        if tensor.bits:
            codes[stem] = tensor.bits
        elif leaf in ("scales", "biases"):
            groups.setdefault(stem, {})[leaf] = tensor.group
    found = {
        f"{stem}.weight": quant_format_with(bits, groups[stem]["scales"], has_biases="biases" in groups[stem])
        for stem, bits in codes.items()
    }
    return lambda matrix, _root: found.get(matrix.name)


def _as_stored(folder: Path, plain: Target) -> Target:
    """The model of a packed folder as adapters are trained on it."""
    stored, how = open_folder(folder).stored(), TuningSection(type="lora")
    return make_target(read_config(folder), how, str(folder), plain.spec.dtype, stored)


def _unpacked(
    codes: TensorSpec, array: mx.array, parts: Mapping[str, tuple[TensorSpec, mx.array]]
) -> mx.array:
    packing = quant_format_with(codes.bits, parts["scales"][0].group, has_biases="biases" in parts)
    exact = {leaf: a.astype(mx.float32) if packing.has_biases else a for leaf, (_, a) in parts.items()}
    found = mx.dequantize(
        array,
        exact["scales"],
        exact.get("biases"),
        group_size=packing.group,
        bits=packing.bits,
        mode=packing.mode,
        global_scale=exact.get("global_scale"),
        dtype=mx.float32,
    )
    mx.eval(found)
    return found


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
    out: Path,
    source: WeightSource,
    spec: ModelSpec,
    choose: Choice,
    side_files: Path,
    card: str = "",
    about: Mapping[str, Any] = MappingProxyType({}),
) -> list[str]:
    """Write `out` from a source of the plain model `spec`; returns notes for the user. UserError.

    `choose`: how each matrix is packed, if it is. `about`: what EXPORT.json also says.
    """
    if spec.family == BITNET_NAME:
        raise UserError(
            f"{side_files}: mlx-lm's {BITNET_NAME} reads weights in BitNet's layout only; nothing was packed"
        )
    chosen: dict[str, QuantFormat] = {}
    table = PackingTable()

    def unit(index: int) -> Iterator[tuple[TensorSpec, mx.array]]:
        return _packed_unit(source, index, choose, chosen, partial(table.add, spec.units[index].name))

    def config() -> dict[str, Any]:
        return packed_config(spec.config, spec.dtype, chosen)

    notes = write_units(out, unit, len(spec.units), config, side_files, card, about, table)
    return [*notes, table.sentence()] if chosen else notes


def write_units(
    out: Path,
    unit: Callable[[int], Iterator[tuple[TensorSpec, mx.array]]],
    count: int,
    config: Callable[[], Mapping[str, Any]],
    side_files: Path,
    card: str = "",
    about: Mapping[str, Any] = MappingProxyType({}),
    table: PackingTable | None = None,
) -> list[str]:
    """Write `out`, a file for each of `count` units of tensors by mlx-lm's names, then `config()`, and what `table` has
    by then; returns notes for the user. UserError.
    """
    refuse_foreign(out)
    temporary = out.parent / f".{out.name}.partial"
    weight_map: dict[str, str] = {}
    with disk_errors(out):
        fresh_folder(temporary)
        for index in range(count):
            name = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            entries = [
                Entry(tensor.name, CODES[tensor.dtype], tuple(array.shape), partial(array_bytes, array))
                for tensor, array in unit(index)
            ]
            size = write_tensors(temporary / name, entries, {"format": "mlx"})
            assert read_header(temporary / name).file_bytes == size
            weight_map |= {entry.name: name for entry in entries}
        write_json(temporary / INDEX_NAME, {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))})
        write_json(temporary / "config.json", config())
        if table is not None and table.matrices:
            write_json(temporary / TABLE_NAME, table.to_json())
        _, notes = copy_side_files(side_files, temporary)
        if card:
            write_text(temporary / "README.md", card)
        publish(temporary, out, "mlx-lm", notes, about)
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
    source: WeightSource,
    index: int,
    choose: Choice,
    chosen: dict[str, QuantFormat],
    noted: Callable[[str, mx.array, mx.array, int], None],
) -> Iterator[tuple[TensorSpec, mx.array]]:
    for tensor, array in source.unit(index):
        packing = choose(tensor, index == 0) if tensor.name.endswith(".weight") else None
        if packing is not None:
            module = tensor.name.removesuffix(".weight")
            chosen[module], parts = packing, quantize(array, packing)
            noted(module, array, unpack(parts, packing), sum(part.nbytes for part in parts))
            yield from zip(packing.tensors(tensor), parts, strict=True)
        else:
            yield tensor, array.astype(getattr(mx, tensor.dtype))
