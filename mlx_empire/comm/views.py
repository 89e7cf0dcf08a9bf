"""Evaluated MLX arrays seen as flat numpy arrays without copying: the form in which bytes cross the network.

numpy has no bfloat16, so those are seen as uint16. The views are writable: MPI receives straight into MLX memory.
Must be called on the main thread (MLX streams belong to threads); the views may be used anywhere.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_empire.model.spec import BLOCK

DTYPES = {
    "bfloat16": mx.bfloat16,
    "float32": mx.float32,
    "float16": mx.float16,
    "uint32": mx.uint32,
    "uint8": mx.uint8,
}


def empty_rows(elements: int, dtype: str) -> mx.array:
    """An evaluated, uninitialised buffer of shape (elements / 64, 64): rows, so that no dimension passes 32 bits."""
    buffer = mx.empty((elements // BLOCK, BLOCK), DTYPES[dtype])
    mx.eval(buffer)
    return buffer


def host_view(array: mx.array) -> np.ndarray:
    """The flat numpy view of an array's memory; bfloat16 is seen as uint16. Evaluates the array."""
    bits = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    mx.eval(bits)
    return np.array(bits, copy=False).reshape(-1)
