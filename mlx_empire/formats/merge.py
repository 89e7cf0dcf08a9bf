"""A base with its adapter added in: plain weights that give the same logits without any adapter.

Decides that a base which was packed while it was loaded is packed and unpacked here too, because the adapter was
trained on those values, and that sums are rounded once, to the base's dtype. One tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import mlx.core as mx

from mlx_empire.errors import UserError
from mlx_empire.formats.adapter_folder import Adapter
from mlx_empire.formats.source import WeightSource
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
