"""A module with the tensors of a model that mlx-lm lacks, so that adapters and packing do to it what they do to others.

It has shapes and names only, and cannot be called.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_empire.model.spec import ModelSpec, is_embedding


class _Counted(nn.Module):
    """The root of such a model, with its layers where describing looks for them."""

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers."""
        found: list[nn.Module] = self.model.layers
        return found


def module_of(spec: ModelSpec) -> nn.Module:
    """mlx's own modules for the tensors of `spec` (`<path>.weight`, `<path>.bias`), lazily.

    A matrix belongs to an embedding (by its name, in the root alone) or a linear module; a vector is only held.
    """
    model = _Counted()
    for unit in spec.units:
        for tensor in unit.tensors:
            stem, _, leaf = tensor.name.rpartition(".")
            *path, last = stem.split(".")
            owner: nn.Module = model
            for i, part in enumerate(path):
                if part.isdigit():
                    continue
                if i + 1 < len(path) and path[i + 1].isdigit():
                    row = owner.setdefault(part, [])
                    while len(row) <= int(path[i + 1]):
                        row.append(nn.Module())
                    owner = row[int(path[i + 1])]
                else:
                    owner = owner.setdefault(part, nn.Module())
            if leaf == "weight" and len(tensor.shape) == 2:
                root = unit is spec.units[0] and is_embedding(stem)
                kind = nn.Embedding(*tensor.shape) if root else nn.Linear(*tensor.shape[::-1], bias=False)
                owner[last] = kind
            else:
                owner.setdefault(last, nn.Module())[leaf] = mx.zeros(tensor.shape)
    return model
