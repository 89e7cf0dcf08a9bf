"""The first weights of a model with adapters: the base's tensors, renamed and perhaps packed, and fresh adapters.

mlx-lm's adapter layers nest the base (`q_proj.linear.weight`), so names change while loading; one tensor of the base
is held at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from mlx_empire.adapters.initial import initial_adapter, magnitude
from mlx_empire.adapters.quantised import pack
from mlx_empire.checkpoint.source import WeightSource
from mlx_empire.plan.model import ModelSpec, TensorSpec


class TunedSource:
    """A `WeightSource` of `spec` (base and adapters) over `base`, a source of the model without adapters."""

    def __init__(self, base: WeightSource, spec: ModelSpec, seed: int) -> None:
        self._base, self._spec, self._seed = base, spec, seed

    def unit(self, index: int) -> Iterator[tuple[TensorSpec, mx.array]]:
        """See `WeightSource.unit`."""
        wanted = {t.name: t for t in self._spec.units[index].tensors}
        base = self._base.unit(index)
        made: dict[str, mx.array] = {}
        for name, tensor in wanted.items():
            if name.endswith((".lora_a", ".lora_b")):
                yield tensor, initial_adapter(tensor, self._seed)
                continue
            while name not in made:
                made |= _made(*next(base), wanted)
            yield tensor, made.pop(name)
        assert next(base, None) is None, f"unit {index}: the base has tensors that the tuned model lacks"


def _made(tensor: TensorSpec, array: mx.array, wanted: dict[str, TensorSpec]) -> dict[str, mx.array]:
    """What becomes of one tensor of the base, by its names in the tuned model."""
    stem, _, leaf = tensor.name.rpartition(".")
    inside = f"{stem}.linear" if f"{stem}.lora_a" in wanted else stem
    name = f"{inside}.{leaf}" if stem else tensor.name
    if wanted[name].dtype == "uint32" and tensor.dtype != "uint32":
        scales, biases = f"{inside}.scales", f"{inside}.biases"
        packed = pack(array, wanted[name].shape[-1], wanted[scales].shape[-1])
        return dict(zip((name, scales, biases), packed, strict=True))
    made = {name: array}
    if leaf == "weight" and f"{stem}.m" in wanted:
        made[f"{stem}.m"] = magnitude(array)
        mx.eval(made[f"{stem}.m"])
    return made
