"""What the families here have in common: the activation that a configuration names, the way through the layers, the
head, and the stored tensors that are no parameters of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask

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


def through(layers: Sequence[nn.Module], x: mx.array, cache: Sequence[Any] | None) -> mx.array:
    """Hidden states (rows, width, hidden) after all `layers`, which take a mask and their own of mlx-lm's `cache`."""
    caches = [None] * len(layers) if cache is None else cache
    mask = create_attention_mask(x, caches[0])
    for layer, own in zip(layers, caches, strict=True):
        x = layer(x, mask, own)
    return x


class CausalModel(nn.Module):
    """A body with its head: `body` under the name that its tensors have, its layers and its embedding by theirs. The
    head is the embedding where `tie_word_embeddings` says so.
    """

    def __init__(self, args: Any, name: str, body: nn.Module, layers: str, embedding: str) -> None:
        super().__init__()
        self.args, self.model_type = args, args.model_type
        self._names = name, layers, embedding
        self[name] = body
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Sequence[Any] | None = None) -> mx.array:
        """(rows, width) tokens -> (rows, width, vocabulary) logits."""
        name, _, embedding = self._names
        x = self[name](inputs, cache)
        logits: mx.array = (
            self[name][embedding].as_linear(x) if self.args.tie_word_embeddings else self.lm_head(x)
        )
        return logits

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Hugging Face's tensors, as they are, but for what is no parameter."""
        return parameters_of(weights, self.args.tie_word_embeddings)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers."""
        name, layers, _ = self._names
        found: list[nn.Module] = self[name][layers]
        return found
