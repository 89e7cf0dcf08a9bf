"""Which results of a layer's forward stay for its backward, which then does not compute them again, and how.

A layer is computed again in the backward from its input. What that costs most are products with weights and attention;
so the results of chosen ones can be *kept*. A layer's calls of linear modules and stacked experts, plain or quantised,
are numbered in their order, adapters' inner ones with them; `ATTENTION` stands for all of its attention in blocks, of
which the output and the log-sum-exp stay. In the forward the results are noted. Where the layer is traced for its vjp,
such a call is a function of what came in, of the module's parameters and of the kept result, and returns the latter.
Its vjp is MLX's own of the same call, whose result is lazy and evaluated by nobody. So gradients have the bits of a
layer that is computed again, and mlx-lm's code is as it is.

Kept are results of modules: a family with products of its own, or MLX's kernels for short rows, has fewer of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_empire.model.attention.blocks import Attention, attend_again, attend_in_blocks, attend_with_sums

ATTENTION = -1
Run = Callable[..., mx.array]
Product = Callable[[Run, list[mx.array]], mx.array]

# By module the parameters by which MLX can differentiate; packed matrices are constants.
_MODULES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight", "bias"),
    nn.QuantizedLinear: ("bias",),
    SwitchLinear: ("weight", "bias"),
    QuantizedSwitchLinear: ("bias",),
}


class Calls(ABC):
    """What is done with a layer's calls while it is run once; `calling` hands over those of products."""

    @abstractmethod
    def product(self, run: Run, given: list[mx.array]) -> mx.array:
        """The next linear module's result; `run(*given)` computes it of its input and its parameters."""

    @abstractmethod
    def attention(self, attention: Attention, given: list[mx.array]) -> mx.array:
        """The result of the next attention, of (q, k, v, sinks), in the place of `attend_in_blocks`."""


@dataclass
class Kept:
    """The results of one layer's run that stay: of products by number, of attention call by call."""

    products: dict[int, mx.array] = field(default_factory=dict)
    attention: list[tuple[mx.array, mx.array]] = field(default_factory=list)

    @classmethod
    def of(cls, numbers: Sequence[int], arrays: Sequence[mx.array]) -> Kept:
        """Products of these `numbers`, and what stays of attention, from what `arrays` gave."""
        products, pairs = arrays[: len(numbers)], arrays[len(numbers) :]
        return cls(dict(zip(numbers, products, strict=True)), list(zip(pairs[::2], pairs[1::2], strict=True)))

    def arrays(self) -> list[mx.array]:
        """All of them."""
        return [*self.products.values(), *(array for pair in self.attention for array in pair)]


class Noting(Calls):
    """Runs a layer and notes the results of the calls that are `wanted`."""

    def __init__(self, wanted: Sequence[int]) -> None:
        self.kept = Kept()
        self._wanted, self._next = frozenset(wanted), 0

    def product(self, run: Run, given: list[mx.array]) -> mx.array:
        result = run(*given)
        if self._next in self._wanted:
            self.kept.products[self._next] = result
        self._next += 1
        return result

    def attention(self, attention: Attention, given: list[mx.array]) -> mx.array:
        output, sums = attend_with_sums(attention, given)
        if ATTENTION in self._wanted:
            self.kept.attention.append((output, sums))
        return output


class Reusing(Calls):
    """Runs a layer with what is kept in the place of its calls."""

    def __init__(self, kept: Kept) -> None:
        self._products, self._attention = dict(kept.products), list(kept.attention)
        self._next = 0

    def product(self, run: Run, given: list[mx.array]) -> mx.array:
        kept = self._products.pop(self._next, None)
        self._next += 1
        return run(*given) if kept is None else _again(run, given, kept)

    def attention(self, attention: Attention, given: list[mx.array]) -> mx.array:
        if not self._attention:
            return attend_in_blocks(attention, given)
        return attend_again(attention, given, *self._attention.pop(0))


class Watching:
    """Notes what came into a layer's products, and what they gave."""

    def __init__(self) -> None:
        self.products: list[tuple[mx.array, mx.array]] = []

    def product(self, run: Run, given: list[mx.array]) -> mx.array:
        result = run(*given)
        self.products.append((given[0], result))
        return result


def _again(run: Run, given: list[mx.array], kept: mx.array) -> mx.array:
    """`kept` as the result of `run(*given)`, differentiable as that is."""
    function: Any = mx.custom_function(lambda kept, *given: kept)

    def vjp(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> list[mx.array]:
        kept, *given = primals
        return [mx.zeros_like(kept), *mx.vjp(run, given, [cotangent])[1]]

    function.vjp(vjp)
    result: mx.array = function(kept, *given)
    return result


@contextmanager
def calling(product: Product) -> Iterator[None]:
    """Within, `product` (see `Calls`) has every call of a linear module. mlx-lm's layers look them up at each call."""
    before = {module: module.__call__ for module in _MODULES}
    try:
        for module, names in _MODULES.items():
            module.__call__ = _handed(before[module], names, product)
        yield
    finally:
        for module, call in before.items():
            module.__call__ = call


def _handed(call: Callable[..., mx.array], names: Sequence[str], product: Product) -> Callable[..., mx.array]:
    def handed(self: nn.Module, x: mx.array, *rest: Any, **more: Any) -> mx.array:
        present = [name for name in names if name in self]

        def run(x: mx.array, *parameters: mx.array) -> mx.array:
            own = [self[name] for name in present]
            try:
                dict.update(self, zip(present, parameters, strict=True))
                return call(self, x, *rest, **more)
            finally:
                dict.update(self, zip(present, own, strict=True))

        return product(run, [x, *(self[name] for name in present)])

    return handed
