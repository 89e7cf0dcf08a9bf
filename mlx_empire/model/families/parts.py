"""What the families here have in common: the activation that a configuration names, and the stored tensors that are no
parameters of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mlx.core as mx
import mlx.nn as nn

Activation = Callable[[mx.array], mx.array]
ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "relu": nn.relu,
    "silu": nn.silu,
}


def activation_of(key: str, name: str) -> Activation:
    """Element by element, dtype kept. ValueError with the configuration's `key` for a name that is not known."""
    if name not in ACTIVATIONS:
        raise ValueError(f"{key}: {name}: not known here; there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def parameters_of(stored: Mapping[str, mx.array], tied: bool) -> dict[str, mx.array]:
    """Hugging Face's tensors without a head that repeats the embedding, and without constants of older folders."""
    unused = ("rotary_emb.inv_freq", *(("lm_head.weight",) if tied else ()))
    return {name: array for name, array in stored.items() if not name.endswith(unused)}
