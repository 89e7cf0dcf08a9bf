"""Training with ternary weights: the layers' linear modules compute with -s, 0 and +s, the optimizer with real numbers.

Quantisation-aware training by the straight-through estimator (Bengio, arXiv:1308.3432), with BitNet b1.58's rounding
(absmean, arXiv:2402.17764) over groups of 64 inputs or over a whole matrix. Of a group w of weights

    c = round(w / mean|w|) cut to -1, 0, 1        s = mean|w| (1 + o)        q = s c
    used = strength q + (1 - strength) w          d used / d w = 1           d used / d o = strength mean|w| c

where o, one number a group, is learned like any weight (a trained scale, as TTQ's, arXiv:1612.01064) and is zero at
first; mean|w| and c are constants to the gradient. `strength` rises from 0 to 1 and is a number of the step, the same
in all modules (`Strength`). At 1 what is used is q to the bit, so a result that holds q computes what was trained.

The module takes the place of mlx-lm's `nn.Linear` in a lazily built model, under the same names. All that streams,
shards, saves and counts a unit's tensors has them from there. Embedding and head stay as they are, as in BitNet, and so
does a router. s is rounded to the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_empire.errors import UserError
from mlx_empire.model.quantize import absmean_codes
from mlx_empire.model.spec import SCALE_OFFSETS, is_router

GROUP = 64
MATRIX = "matrix"


@dataclass
class Strength:
    """How much of the rounding is in force, from 0 to 1: an evaluated float32 scalar, or a trace's stand-in for one."""

    value: mx.array = field(default_factory=lambda: mx.array(1.0))

    def at(self, share: float) -> None:
        """From now on `share`."""
        self.value = mx.array(share, mx.float32)
        mx.eval(self.value)

    @contextmanager
    def given(self, value: mx.array) -> Iterator[None]:
        """Within, `value`."""
        before, self.value = self.value, value
        try:
            yield
        finally:
            self.value = before


class TernaryLinear(nn.Module):
    """(.., inputs) -> (.., outputs) by a rounded weight; `scale_offsets` (outputs, groups) float32, or (1, 1)."""

    def __init__(self, plain: nn.Linear, group: int | str, strength: Strength) -> None:
        super().__init__()
        self.weight = plain.weight
        if "bias" in plain:
            self.bias = plain.bias
        outputs, inputs = plain.weight.shape
        self.scale_offsets = mx.zeros((1, 1) if group == MATRIX else (outputs, inputs // GROUP))
        self.strength = strength

    def __call__(self, x: mx.array) -> mx.array:
        """x times the weight that is used, transposed, and the bias."""
        weight = used(self.weight, self.scale_offsets, self.strength.value)
        y: mx.array = x @ weight.T
        return y + self.bias if "bias" in self else y


def used(weight: mx.array, offsets: mx.array, strength: mx.array) -> mx.array:
    """What a module computes with, in the weight's shape and dtype; see the module's docstring."""
    groups = weight.astype(mx.float32).reshape(*offsets.shape, -1)
    held = mx.stop_gradient(groups)
    codes, scales = _codes_and_scales(held, offsets, weight.dtype)
    mixed = strength * (codes * scales) + (1 - strength) * held
    # The last summand is zero, and hands the gradient through.
    return (mixed + (groups - held)).reshape(weight.shape).astype(weight.dtype)


def rounded(weight: mx.array, offsets: mx.array) -> mx.array:
    """q: what is used at full strength."""
    groups = weight.astype(mx.float32).reshape(*offsets.shape, -1)
    codes, scales = _codes_and_scales(groups, offsets, weight.dtype)
    return (codes * scales).reshape(weight.shape).astype(weight.dtype)


def _codes_and_scales(groups: mx.array, offsets: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """(.., group) and (.., 1) in float32, the scales with values of `dtype`."""
    means = mx.mean(mx.abs(groups), axis=-1, keepdims=True)
    scales = (means * (1 + offsets[..., None])).astype(dtype).astype(mx.float32)
    return absmean_codes(groups, means), scales


def put_ternary(model: nn.Module, group: int | str, name: str) -> None:
    """Replace the layers' linear modules, lazily; `group`: 64 or "matrix". UserError where there are none, or experts.

    A module whose inputs are not whole groups of 64 stays as it is.
    """
    strength, found = Strength(), 0
    for layer in model.layers:
        modules = dict(layer.named_modules())
        if any(isinstance(module, SwitchLinear) for module in modules.values()):
            raise UserError(
                f"tuning.qat: ternary: {name} is a mixture, and its stacked experts cannot be trained so; use "
                "tuning.type: qlora with tuning.bits: ternary, or a dense model"
            )
        for path, module in modules.items():
            plain = type(module) is nn.Linear and not is_router(f"{path}.weight")
            if not plain or module.weight.shape[-1] % GROUP:
                continue
            *owners, last = path.split(".")
            owner = layer
            for part in owners:
                owner = owner[int(part)] if isinstance(owner, list) else owner[part]
            owner[int(last) if isinstance(owner, list) else last] = TernaryLinear(module, group, strength)
            found += 1
    if not found:
        raise UserError(
            f"tuning.qat: ternary: no linear module of {name}'s layers has a multiple of {GROUP} inputs; leave it out"
        )


def strength_of(layers: Iterable[nn.Module]) -> Strength | None:
    """What the layers' ternary modules share; None where there are none."""
    ternary = (module for layer in layers for module in layer.modules() if isinstance(module, TernaryLinear))
    return next((module.strength for module in ternary), None)


@contextmanager
def in_full(strength: Strength | None) -> Iterator[None]:
    """Within, weights are ternary however far the warm-up is: what is measured is what a result will hold."""
    if strength is None:
        yield
        return
    with strength.given(mx.array(1.0)):
        yield


def folded(tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """A unit's tensors as those of the plain model: trained weights rounded (lazily), their offsets gone."""
    plain = {}
    for name, array in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == SCALE_OFFSETS:
            continue
        offsets = tensors.get(f"{stem}.{SCALE_OFFSETS}") if leaf == "weight" else None
        plain[name] = array if offsets is None else rounded(array, offsets)
    return plain
