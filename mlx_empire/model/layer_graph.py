"""The graph of a layer's forward and of its vjp, as the engine asks MLX for it, with real shapes and without a byte.

MLX is lazy: a layer that is called on arrays without data gives the primitives that would be evaluated.
`mx.export_function` tells their shapes, but of a graph in which equal parts were merged; `mx.export_to_dot` tells the
graph as it is, but no shapes. Both begin at the same outputs, and merging keeps the order of inputs, so walking the
two together from there gives every array of the true graph its shape.

Primitives are those of the CPU, on every machine: what is a kernel of its own on Metal is in parts here.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_empire.errors import EmpireError
from mlx_empire.model.build import reason_of
from mlx_empire.model.graph import Graph
from mlx_empire.model.storage import Primitive, Shape

Arrays = Sequence[mx.array]
Function = Callable[..., list[mx.array]]

_DOT = re.compile(
    r'\{ (?P<node>\d+) \[label ="(?P<label>[^"]*)"'
    r'|"(?P<input>[^"]+)" -> (?P<reader>\d+)'
    r'|(?P<maker>\d+) -> "(?P<output>[^"]+)"'
)
_NO_WORK = ("Copy", "StopGradient")  # what the export leaves out


class NotTraceable(EmpireError):
    """MLX does not tell the graph of this layer."""


# ---- any function's graph


@dataclass
class _Exported:
    """What `mx.export_function` tells: by name shapes and bytes of an element, and what makes an array."""

    shapes: dict[str, tuple[Shape, int]]
    makers: dict[str, dict[str, Any]]
    inputs: list[str]
    outputs: list[str]


def graph_of(function: Function, arrays: Arrays, held: Sequence[int]) -> Graph:
    """The graph of `function(*arrays)`, whose list of results is evaluated in order; nothing is computed.

    `held`: positions of the arrays that the caller keeps. NotTraceable where MLX cannot export a primitive.
    """
    told: list[dict[str, Any]] = []
    drawing = io.StringIO()

    def noted(*given: mx.array) -> list[mx.array]:
        results = function(*given)
        names = {f"o{i}": a for i, a in enumerate(results)} | {f"i{i}": a for i, a in enumerate(given)}
        mx.export_to_dot(drawing, **names)
        return results

    try:
        with mx.stream(mx.cpu):
            mx.export_function(told.append, noted, *arrays)
    except Exception as error:  # MLX's for a primitive that it cannot export, or foreign code's
        raise NotTraceable(reason_of(error)) from None
    return _joined(_exported(told), drawing.getvalue(), held)


def _exported(told: list[dict[str, Any]]) -> _Exported:
    found = _Exported({}, {}, [], [])
    for event in told:
        if event["type"] == "constants":
            found.shapes |= {name: (tuple(a.shape), a.dtype.size) for name, a in event["constants"]}
        for key in ("inputs", "outputs"):
            if event["type"] in (key, "primitive"):
                found.shapes |= {name: (tuple(shape), dtype.size) for name, shape, dtype in event[key]}
        if event["type"] == "primitive":
            found.makers |= {name: event for name, _, _ in event["outputs"]}
        elif event["type"] in ("inputs", "outputs"):
            setattr(found, event["type"], [name for name, _, _ in event[event["type"]]])
    return found


def _joined(exported: _Exported, drawing: str, held: Sequence[int]) -> Graph:
    """The drawn graph with the exported one's shapes and arguments."""
    labels: dict[str, str] = {}
    inputs: dict[str, list[str]] = {}
    outputs: dict[str, list[str]] = {}
    makers: dict[str, str] = {}
    for node, label, array, reader, maker, made in _DOT.findall(drawing):
        if node:
            labels[node], inputs[node], outputs[node] = label, [], []
        elif array:
            inputs[reader].append(array)
        else:
            outputs[maker].append(made)
            makers[made] = maker
    twins = {f"i{i}": name for i, name in enumerate(exported.inputs)}
    primitives: dict[str, tuple[str, Sequence[Any]]] = {}
    pairs = [(f"o{i}", name) for i, name in enumerate(exported.outputs)]
    while pairs:
        drawn, twin = pairs.pop()
        if drawn in twins:
            continue
        twins[drawn] = twin
        if (node := makers.get(drawn)) is None:
            continue
        if labels[node] in _NO_WORK:
            primitives[node] = "Copy", ()
            pairs.append((inputs[node][0], twin))
            continue
        told = exported.makers[twin]
        primitives[node] = told["name"], told["arguments"]
        pairs += zip(inputs[node], [name for name, _, _ in told["inputs"]], strict=True)
        pairs += zip(outputs[node], [name for name, _, _ in told["outputs"]], strict=True)
    numbers = {name: n for n, name in enumerate(twins)}
    number = numbers.__getitem__
    nodes = [
        Primitive(*primitives[node], tuple(map(number, inputs[node])), tuple(map(number, outputs[node])))
        for node in labels
    ]
    given = [numbers[f"i{i}"] for i in range(len(exported.inputs))]
    known = {*given}
    constants = [n for name, n in numbers.items() if name not in makers and n not in known]
    return Graph(
        tuple(exported.shapes[twin][0] for twin in twins.values()),
        tuple(exported.shapes[twin][1] for twin in twins.values()),
        nodes,
        [numbers[f"o{i}"] for i in range(len(exported.outputs))],
        given,
        [*given, *constants],
        frozenset([*(given[i] for i in held), *constants]),
    )
