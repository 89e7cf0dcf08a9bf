"""Adapters of several daughters on one base, in one model: a layer runs once for all of them.

A micro-batch holds the rows of every daughter, one after the other and equally many each. What all share (the base's
products, norms, attention) does not mix rows; each LoRA module adds to the rows of a daughter what its own matrices
make of them, by products batched over the daughters (as mLoRA does, arXiv:2312.02515). So every daughter's loss and
gradients are what they would be alone, and the base lies in memory once and is read once a layer.

Only plain LoRA on linear modules is put together; a model with other adapters holds one daughter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

_OWN = re.compile(r"\.daughters\.(\d+)\.")


@dataclass
class Present:
    """The places of the daughters whose rows a micro-batch holds, in order; shared by all modules of a model."""

    places: list[int] = field(default_factory=list)


class LoRATogether(nn.Module):
    """mlx-lm's `LoRALinear` for `count` daughters; the base's module stays `linear`."""

    def __init__(self, alone: LoRALinear, count: int, present: Present) -> None:
        super().__init__()
        self.linear, self.dropout, self.scale = alone.linear, alone.dropout, alone.scale
        self.daughters = [{"lora_a": alone.lora_a, "lora_b": alone.lora_b} for _ in range(count)]
        self._present = present

    def __call__(self, x: mx.array) -> mx.array:
        """(rows, width, inputs) -> (rows, width, outputs); rows belong to the daughters present, in order."""
        own = [self.daughters[place] for place in self._present.places]
        a, b = (mx.stack([one[name] for one in own]) for name in ("lora_a", "lora_b"))
        y = self.linear(x)
        z = (self.dropout(x).reshape(len(own), -1, x.shape[-1]) @ a) @ b
        sum_: mx.array = y + (self.scale * z).reshape(y.shape).astype(x.dtype)
        return sum_


def may_share(model: nn.Module) -> bool:
    """Whether every adapter of a model is of the kind that can be put together."""
    return not any(
        isinstance(m, DoRALinear | LoRAEmbedding | LoRASwitchLinear) for _, m in model.named_modules()
    )


def put_together(model: nn.Module, count: int) -> Present:
    """Replace every LoRA module of a lazily built model for `count` daughters; the caller says which are present."""
    present = Present([0])
    assert count == 1 or may_share(model)
    for layer in model.layers:
        found = {key: m for key, m in layer.named_modules() if isinstance(m, LoRALinear)}
        for key, alone in found.items():
            *path, last = key.split(".")
            owner = layer
            for part in path:
                owner = owner[int(part)] if isinstance(owner, list) else owner[part]
            together = LoRATogether(alone, count, present)
            owner[last] = together
    return present


def own_name(name: str) -> tuple[int, str]:
    """(a daughter's place, what mlx-lm calls the tensor in a model with that one alone)."""
    found = _OWN.search(name)
    return (int(found[1]), _OWN.sub(".", name)) if found else (0, name)
