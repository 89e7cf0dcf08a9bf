"""The first weights of a model with adapters: the base's tensors, renamed and perhaps packed, and fresh adapters.

mlx-lm's adapter layers nest the base (`q_proj.linear.weight`), so names change while loading; one tensor of the base
is held at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from mlx_empire.formats.source import WeightSource
from mlx_empire.model.lora import initial_adapter, magnitude
from mlx_empire.model.quantize import Choice, quantize
from mlx_empire.model.spec import ModelSpec, TensorSpec


class TunedSource:
    """A `WeightSource` of `spec` (base and adapters) over `base`, a source of the model without adapters.

    `packing`: how matrices of the base are packed while they are loaded, if any are.
    """

    def __init__(self, base: WeightSource, spec: ModelSpec, seed: int, packing: Choice | None) -> None:
        self._base, self._spec, self._seed, self._packing = base, spec, seed, packing

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
                made |= self._made(*next(base), wanted, root=index == 0)
            yield tensor, made.pop(name)
        assert next(base, None) is None, f"unit {index}: the base has tensors that the tuned model lacks"

    def _made(
        self, tensor: TensorSpec, array: mx.array, wanted: dict[str, TensorSpec], *, root: bool
    ) -> dict[str, mx.array]:
        """What becomes of one tensor of the base, by its names in the tuned model."""
        stem, _, leaf = tensor.name.rpartition(".")
        places = (f"{stem}.linear", f"{stem}.embedding", stem) if stem else ("",)
        name = next(n for n in (f"{p}.{leaf}" if p else leaf for p in places) if n in wanted)
        if wanted[name].bits and not tensor.bits:
            packing = self._packing(tensor, root) if self._packing else None
            assert packing is not None, f"{name} is packed while loading: by what?"
            inside = name.removesuffix(".weight")
            names = (name, f"{inside}.scales", f"{inside}.biases")
            return dict(zip(names, quantize(array, packing), strict=False))
        made = {name: array}
        if leaf == "weight" and f"{stem}.m" in wanted:
            made[f"{stem}.m"] = magnitude(array)
            mx.eval(made[f"{stem}.m"])
        return made
