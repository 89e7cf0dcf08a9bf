"""One compiled trace for all layers that are the same function of their tensors, in place of a graph for each call.

A layer's forward and vjp are traced by `mx.compile` once for each function of layer, shape of micro-batch and pattern
of attention, however many layers there are; then Python builds no graph for them, and MLX fuses what is element-wise.
All that differs from call to call is given to the trace: every tensor of the unit (frozen ones too), what the model
passes to its layers, the state of MLX's generator. What a trace holds as constants is what `function_of` compares.

The bits are those of the layer called by itself: the same operations in the same order, each rounded as it would be
alone. That is so on a CPU (`tests/engine/test_compiled_layers.py`), as far as the compiler of fused kernels does not
round otherwise: one that contracts products and sums is found out at the start, and powers are left to MLX (g++ makes
a product of a square, which MLX's own kernel takes from the library). On Metal nobody has looked.

A layer that cannot be traced is called by itself: one that looks at numbers in Python, that changes itself when it is
called, that takes powers (gelu by tanh), that draws random numbers which nobody has seeded, or that is given objects of
which nobody knows what they hold. `untraced` says so.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import cache, partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_empire.cluster.machine import computes_on_gpu
from mlx_empire.comm.buffers import host_view
from mlx_empire.engine.left_alone import generator_as_before, layer_as_before, states_as_before
from mlx_empire.engine.store import ShardStore
from mlx_empire.errors import UserError
from mlx_empire.model.layers import LayerArguments
from mlx_empire.model.together import Present
from mlx_empire.optim.compile import compiling_alone, may_compile

MOST = 64  # traces that are kept although the last step had no use for them
COMPARED_BYTES = 1 << 20  # larger constants are the same only where they are one array
Arrays = Sequence[mx.array]
# Of the layer's trained tensors, further arrays and the layer's arguments: results, and what there is to know about
# them beside their values.
Body = Callable[[Arrays, Arrays, LayerArguments], tuple[list[mx.array], Any]]


class LayerPass(NamedTuple):
    """`body` of a layer, counted from 0, of `given` and `arguments`.

    `what`: all that the body depends on beside the layer and what it is given; its trace stays, so it must hold no
    arrays. `seeded`: MLX's generator was seeded for this very call.
    """

    layer: int
    what: Hashable
    body: Body
    given: Arrays
    arguments: LayerArguments
    seeded: bool


class Traces:
    """Runs passes of layers, traced where `compiles`. Layers are counted from 0, and their units are bound."""

    def __init__(self, layers: Sequence[nn.Module], store: ShardStore, *, compiles: bool) -> None:
        self._layers, self._store = layers, store
        self.untraced: dict[type, str] = {}  # by class of layer a line that says why
        self._compiles = compiles and may_compile()
        if self._compiles and not _rounds_alike():
            self._compiles = False
            self.untraced[object] = (
                "numerics.compiled_layers: fused kernels round otherwise here than MLX's own (another g++ than make "
                "setup's?); layers run one operation at a time"
            )
        self._functions: dict[int, tuple[Hashable, list[Present]]] = {}
        self._known: dict[Hashable, tuple[Callable[..., list[mx.array]], list[Any]]] = {}
        self._used: set[Hashable] = set()
        self._fresh = False

    def begin(self) -> None:
        """A new step or evaluation: what was not used by the last one makes room."""
        if len(self._known) > MOST:
            self._known = {key: trace for key, trace in self._known.items() if key in self._used}
        self._used = set()

    def run(self, asked: LayerPass) -> tuple[list[mx.array], Any]:
        """What the pass's body gives, lazily; afterwards the layer has its own tensors."""
        index = asked.layer
        layer = self._layers[index]
        if self._compiles and type(layer) not in self.untraced:
            try:
                return self._traced(asked)
            except UserError:
                raise
            except Exception as error:  # foreign code: called by itself it may well run
                self._compiles_not(layer, error)
        weights = self._store.bound(index + 1)
        try:
            return asked.body(weights, asked.given, asked.arguments)
        finally:
            self._store.rebind(index + 1, weights)

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Within, what `run` gave last is evaluated: one process at a time where kernels have to be built for it."""
        if not self._fresh:
            yield
            return
        with compiling_alone():
            yield
        self._fresh = False

    def _compiles_not(self, layer: nn.Module, error: Exception) -> None:
        why = str(error).strip().split("\n")[0][:200] or type(error).__name__
        self.untraced[type(layer)] = (
            f"numerics.compiled_layers: layers of {type(layer).__module__}.{type(layer).__name__} cannot be traced "
            f"({why}); they run one operation at a time"
        )

    def _traced(self, asked: LayerPass) -> tuple[list[mx.array], Any]:
        index, what, body, given, arguments, seeded = asked
        own, rest, joined = without_arrays(arguments)
        first, given = len(given), _by_rows([*given, *own])
        layer, tensors = self._layers[index], self._store.all_bound(index + 1)
        if index not in self._functions:
            function, present = function_of(layer, self._store.places(index + 1))
            # A trace is called with the unit's tensors in their order, and differentiated by those that train.
            self._functions[index] = (function, self._store.layout(index + 1)), present
        function, present = self._functions[index]
        places = tuple(tuple(one.places) for one in present)
        key = function, places, layer.training, what, rest, tuple((a.shape, a.dtype) for a in given)
        self._used.add(key)
        if key in self._known:
            compiled, notes = self._known[key]
            return compiled(*tensors, *given), notes[0]
        notes, count = [], len(tensors)  # the trace stays, and must hold none of the arrays

        def whole(*arrays: mx.array) -> list[mx.array]:
            trained = self._store.rebind_all(index + 1, arrays[:count])
            others = arrays[count:]
            results, note = body(trained, others[:first], joined(others[first:]))
            if "Power" in _operations(results):
                raise RuntimeError("it takes powers, which fused kernels round otherwise")
            notes.append(note)
            return results

        compiled = mx.compile(whole, inputs=[mx.random.state, *(one.states for one in present)])
        with layer_as_before(layer), generator_as_before(seeded), states_as_before(present):
            try:
                results = compiled(*tensors, *given)
            finally:
                self._store.rebind_all(index + 1, tensors)
        self._known[key], self._fresh = (compiled, notes), True
        return results, notes[0]


# ---- what layers are given


class _Hole:
    """In the place of an array."""


def without_arrays(
    given: LayerArguments,
) -> tuple[list[mx.array], Hashable, Callable[[Arrays], LayerArguments]]:
    """The arrays among a layer's arguments, all the rest, and what puts others in the arrays' places, which holds none.

    TypeError where the rest is more than plain values: one object cannot be told from a later one at its address.
    """
    arrays: list[mx.array] = []

    def said(value: Any) -> Hashable:
        if isinstance(value, mx.array):
            arrays.append(value)
            return _Hole
        if type(value) is dict:
            return dict, tuple((key, said(own)) for key, own in value.items())
        if type(value) in (list, tuple):
            return type(value), tuple(map(said, value))
        if not _is_plain(value):
            raise TypeError(
                f"it is given a {type(value).__name__}, which is neither an array nor a plain value"
            )
        return type(value), value

    tree, pattern = (given.positional, given.keywords), given.pattern
    rest = said(tree)
    holes = tree_map(lambda leaf: _Hole if isinstance(leaf, mx.array) else leaf, tree)

    def joined(arrays: Arrays) -> LayerArguments:
        values = iter(arrays)
        positional, keywords = tree_map(lambda leaf: next(values) if leaf is _Hole else leaf, holes)
        return LayerArguments(positional, keywords, pattern)

    return arrays, (rest, pattern), joined


def _by_rows(arrays: Arrays) -> Arrays:
    """The arrays, each laid out by rows; lazily, and free for one that is and has a buffer of its own.

    MLX's CPU builds another kernel for another layout, and kernels are built under the lock at a trace's first
    evaluation only (`evaluated`). A unit's tensors are laid out so, as parts of flat buffers. A GPU needs no lock.
    """
    return arrays if computes_on_gpu() else [mx.contiguous(array) for array in arrays]


# ---- what a layer computes


def function_of(layer: nn.Module, tensors: set[tuple[int, Any]]) -> tuple[Hashable, list[Present]]:
    """What two layers have in common that compute the same of their tensors, and what else their results hang on.

    Compared are classes, names and all values in their modules, but those at `tensors`: (id of container, key), of
    which the shapes count. What is neither a number, a word, nor made of such is the same only where it is one object.
    """
    present: list[Present] = []
    ours: set[int] = set()  # modules that are being looked at: they may name one another

    def said(value: Any) -> Hashable:
        if isinstance(value, Present):
            present.append(value)
            return Present, len(present)
        if isinstance(value, nn.Module):
            if id(value) in ours:
                return "module", type(value)
            ours.add(id(value))
            switches = {name: own for name, own in vars(value).items() if name != "_training"}
            return type(value), entries(value), entries(switches)
        if isinstance(value, dict):
            return type(value), entries(value)
        if isinstance(value, list | tuple):
            return type(value), tuple(one(value, n, own) for n, own in enumerate(value))
        if isinstance(value, set | frozenset):
            return type(value), frozenset(map(said, value))
        if isinstance(value, partial):
            return partial, said(value.func), said(value.args), said(value.keywords)
        return _constant(value) if isinstance(value, mx.array) else _plain(value)

    def one(container: Any, key: Any, value: Any) -> Hashable:
        if (id(container), key) in tensors:
            return "tensor", value.shape, value.dtype
        return said(value)

    def entries(container: dict[Any, Any]) -> Hashable:
        return tuple(
            (key, one(container, key, own)) for key, own in sorted(container.items(), key=lambda e: str(e[0]))
        )

    return said(layer), present


def _is_plain(value: Any) -> bool:
    """Whether a value is told by its class and what it equals."""
    return value is None or isinstance(value, bool | int | float | complex | str | bytes | Enum | mx.Dtype)


def _plain(value: Any) -> Hashable:
    return (type(value), value) if _is_plain(value) else id(value)


def _constant(array: mx.array) -> Hashable:
    if array.nbytes > COMPARED_BYTES:
        return id(array)
    values = host_view(mx.contiguous(array))
    return array.shape, array.dtype, hashlib.sha256(values.tobytes()).digest()


# ---- the same bits


@cache
def _rounds_alike() -> bool:
    """Whether a fused kernel has, on this machine, the bits of MLX's own kernels of the same operations."""

    def function(x: mx.array, y: mx.array) -> list[mx.array]:
        gate = mx.sigmoid(x) * y / 3 + mx.exp(-x * x) * mx.tanh(y * 0.7)
        return [gate, mx.rsqrt(x * x + 1e-5) * y + mx.erf(x) - mx.log1p(y * y)]

    x, y = (mx.random.normal((1 << 12,), key=mx.random.key(seed)) for seed in range(2))
    with compiling_alone():
        pairs = zip(function(x, y), mx.compile(function)(x, y), strict=True)
        return all(bool(mx.array_equal(alone, fused).item()) for alone, fused in pairs)


def _operations(results: Arrays) -> set[str]:
    """The names of all that results are made by."""
    drawing = io.StringIO()
    mx.export_to_dot(drawing, *results)
    return set(re.findall(r'\[label ="(\w+)"', drawing.getvalue()))
