"""What packing costs and saves, matrix by matrix and layer by layer: `packing.json` beside packed weights.

error        ||w - q|| / ||w|| (Frobenius) of the plain values w and the packed ones q; of ternary training w are
             the weights that the optimizer holds, and what the run lost by them is in its losses, not here
bits         of a packed weight, its part of scales and biases included
bytes, plain_bytes
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_empire.model.spec import SCALE_OFFSETS, UnitSpec

TABLE_NAME = "packing.json"


@dataclass
class _Sums:
    """Sums over weights: their number, squares of differences and of plain values, bytes packed and plain."""

    weights: int = 0
    lost: float = 0.0
    whole: float = 0.0
    packed: int = 0
    plain: int = 0

    def add(self, other: _Sums) -> None:
        self.weights += other.weights
        self.lost += other.lost
        self.whole += other.whole
        self.packed += other.packed
        self.plain += other.plain

    def to_json(self) -> dict[str, float]:
        error = math.sqrt(self.lost / self.whole) if self.whole else 0.0
        bits = 8 * self.packed / max(self.weights, 1)
        return {"error": error, "bits": bits, "bytes": self.packed, "plain_bytes": self.plain}


@dataclass
class PackingTable:
    """Gathered one matrix at a time."""

    layers: dict[str, _Sums] = field(default_factory=dict)
    matrices: dict[str, _Sums] = field(default_factory=dict)

    def add(self, unit: str, module: str, plain: mx.array, packed: mx.array, nbytes: int) -> None:
        """A module's matrix, its packed values in the same shape, and the bytes that hold those."""
        wide = plain.astype(mx.float32)
        difference = packed.astype(mx.float32) - wide
        lost, whole = np.array(mx.stack([(a * a).sum() for a in (difference, wide)])).tolist()
        found = _Sums(plain.size, lost, whole, nbytes, plain.nbytes)
        self.matrices[module] = found
        self.layers.setdefault(unit, _Sums()).add(found)

    def add_trained(
        self, unit: UnitSpec, tensors: Mapping[str, mx.array], plain: Mapping[str, mx.array]
    ) -> None:
        """A trained unit's ternary matrices: `tensors` as the optimizer holds them, `plain` as they are written."""
        for name in tensors:
            if name.endswith(f".{SCALE_OFFSETS}"):
                module = name.removesuffix(f".{SCALE_OFFSETS}")
                held, groups = tensors[f"{module}.weight"], tensors[name].size
                # MLX's two bits with a scale and a bias a group, or BitNet's with one scale.
                scales = held.itemsize * (1 if groups == 1 else 2 * groups)
                self.add(unit.name, module, held, plain[f"{module}.weight"], held.size // 4 + scales)

    def total(self) -> _Sums:
        """Of all matrices."""
        sums = _Sums()
        for one in self.matrices.values():
            sums.add(one)
        return sums

    def to_json(self) -> dict[str, Any]:
        """What the file says."""
        parts = {"layers": self.layers, "matrices": self.matrices}
        tables = {name: {k: v.to_json() for k, v in part.items()} for name, part in parts.items()}
        return {"total": self.total().to_json(), **tables}

    def sentence(self) -> str:
        """The same in a line."""
        total = self.total().to_json()
        return (
            f"{len(self.matrices)} matrices in {total['bits']:.2f} bits a weight, {total['bytes']:,} bytes for "
            f"{total['plain_bytes']:,}; off by {total['error']:.3f} of their norm ({TABLE_NAME} has each layer)"
        )
