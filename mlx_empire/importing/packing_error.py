"""How far packed weights are from what they were: NF4 with double quantisation beside this package's 4-bit groups.

NF4 (QLoRA, arXiv:2305.14314). Blocks of 64 weights w share a = max |w|; a weight becomes a c_q, with q = argmin |w
/ a - c_q| over 16 levels c. With Q the normal quantile function and o = 1 - (1/32 + 1/30) / 2, the levels are 0, Q
at 8 even steps from o to above 1/2, and -Q at 7 such steps, all divided by Q(o). Double quantisation keeps a as A
+ s d: A is the mean of the matrix's constants, s = max |a - A| over 256 of them, d the nearest of the 256 levels
of the dynamic 8-bit code: 0, 1 and, for i from 0 to 6 and either sign, 10^(i - 6) times the means of neighbours
among 2^i + 1 even steps from 0.1 to 1. In all 4 + 8/64 + 32/(64 x 256) = 4.127 bits a weight.

The error of a packing is sqrt(sum (w - w')^2 / sum w^2) over the weights that are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import mlx.core as mx
import numpy as np

from mlx_empire.formats.hf_folder import has_weights, open_folder
from mlx_empire.model.config import HEADS
from mlx_empire.model.quantize import QUANT_FORMATS, quantize
from mlx_empire.model.spec import is_embedding

BLOCK, CONSTANTS = 64, 256
NF4_BITS, GROUP_BITS = 4 + 8 / BLOCK + 32 / (BLOCK * CONSTANTS), 4 + 32 / BLOCK
MOST_ROWS = 64  # of a matrix
SAMPLE = (1024, 1024)  # of normal numbers, where there are no weights


@dataclass(frozen=True)
class PackingError:
    """Relative errors of both packings, and what they were measured on."""

    nf4: float
    groups: float
    where: str

    def sentence(self) -> str:
        """For a person."""
        return (
            f"error of packing, measured on {self.where}: NF4 with double quantisation {self.nf4:.4f} in "
            f"{NF4_BITS:.3f} bits a weight, 4-bit groups of 64 {self.groups:.4f} in {GROUP_BITS:g} (root mean square, "
            "as a part of the weights' own)"
        )


def packing_error(folder: Path | None) -> PackingError:
    """Measured on rows of each matrix in `folder` that both would pack; on normal numbers where it has no weights."""
    if folder is not None and has_weights(folder):
        matrices, where = _matrices(folder), f"weights, at most {MOST_ROWS} rows of each matrix of {folder}"
    else:
        drawn = np.random.default_rng(0).standard_normal(SAMPLE, np.float32)
        matrices, where = (
            iter([mx.array(0.02 * drawn).astype(mx.bfloat16)]),
            "normal numbers (no weights are here)",
        )
    sums = np.zeros(3)
    for matrix in matrices:
        packing = QUANT_FORMATS[4]
        codes, scales, biases = quantize(matrix, packing)
        back = mx.dequantize(codes, scales, biases, packing.group, packing.bits).astype(mx.float32)
        weights = np.array(matrix.astype(mx.float32))
        both = (np.zeros_like(weights), nf4(weights), np.array(back))
        sums += [float(np.square(weights - one, dtype=np.float64).sum()) for one in both]
    whole = sums[0] or 1.0
    return PackingError(float(np.sqrt(sums[1] / whole)), float(np.sqrt(sums[2] / whole)), where)


def _matrices(folder: Path) -> Iterator[mx.array]:
    for name, array in sorted(open_folder(folder).load().items()):
        if is_embedding(name) or name.endswith(HEADS) or not mx.issubdtype(array.dtype, mx.floating):
            continue  # bitsandbytes leaves embeddings and heads as they are
        if array.ndim == 2 and QUANT_FORMATS[4].packs(name, array.shape, root=False):
            step = -(-array.shape[0] // MOST_ROWS)
            yield array[::step]


def nf4_levels() -> np.ndarray:
    """The 16 levels, ascending, float32."""
    outer = 1 - (1 / 32 + 1 / 30) / 2
    quantile = np.vectorize(NormalDist().inv_cdf)
    up, down = (quantile(np.linspace(outer, 0.5, count)[:-1]) for count in (9, 8))
    levels = np.sort(np.concatenate([-down, [0.0], up]))
    return np.asarray(levels / levels.max(), np.float32)


def dynamic_levels() -> np.ndarray:
    """The 256 levels of the dynamic 8-bit code, ascending, float32."""
    found = [0.0, 1.0]
    for decade in range(7):
        steps = np.linspace(0.1, 1, 2**decade + 1)
        means = (steps[:-1] + steps[1:]) / 2 * 10.0 ** (decade - 6)
        found += [*means, *-means]
    return np.sort(np.array(found)).astype(np.float32)


def nf4(weights: np.ndarray) -> np.ndarray:
    """What `weights` (rows, inputs) float32, inputs a multiple of 64, are after NF4 with double quantisation."""
    blocks = weights.reshape(-1, BLOCK)
    constants = _double(np.abs(blocks).max(axis=1))
    scale = np.where(constants == 0, 1, constants)[:, None]
    levels = nf4_levels()
    codes = _nearest(levels, blocks / scale)
    return np.asarray(levels[codes] * constants[:, None], np.float32).reshape(weights.shape)


def _double(constants: np.ndarray) -> np.ndarray:
    mean = constants.mean()
    padded = np.zeros(-(-len(constants) // CONSTANTS) * CONSTANTS, np.float32)
    padded[: len(constants)] = constants - mean
    blocks = padded.reshape(-1, CONSTANTS)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    levels = dynamic_levels()
    kept = levels[_nearest(levels, blocks / np.where(largest == 0, 1, largest))] * largest
    return np.asarray(kept.reshape(-1)[: len(constants)] + mean, np.float32)


def _nearest(levels: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, values)
