"""The values that adapters start from: a function of the run's seed and the tensor's name, or of the base's weights.

`lora_a` is uniform in +-1 / sqrt(inputs), as mlx-lm draws it, from a key of its own, so neither the number of ranks
nor the other tensors matter; `lora_b` is zero, so training starts from the base's own output; DoRA's magnitude is the
norm of each of the base's rows.
"""

from __future__ import annotations

import hashlib
import math

import mlx.core as mx

from mlx_empire.model.lora_many import own_name
from mlx_empire.model.spec import TensorSpec


def initial_adapter(tensor: TensorSpec, seed: int) -> mx.array:
    """`lora_a` or `lora_b` before the first step, in float32. Stacked experts have their inputs last."""
    if tensor.name.endswith(".lora_b"):
        return mx.zeros(tensor.shape)
    assert tensor.name.endswith(".lora_a"), tensor.name
    inputs = tensor.shape[-1] if len(tensor.shape) == 3 else tensor.shape[0]
    bound = 1 / math.sqrt(inputs)
    _, name = own_name(tensor.name)  # trained together or alone, a daughter begins alike
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    key = mx.random.key(int.from_bytes(digest[:8], "little"))
    return mx.random.uniform(-bound, bound, tensor.shape, key=key)


def magnitude(weight: mx.array) -> mx.array:
    """DoRA's `m` of a matrix (outputs, inputs): the norm of each row, in float32."""
    return mx.linalg.norm(weight.astype(mx.float32), axis=1)
