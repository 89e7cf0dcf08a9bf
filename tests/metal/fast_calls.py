"""What is asked of `mx.fast`, and what MLX does with it on Metal: a kernel of its own, other nodes, or an error.

On a CPU these calls are put together from other nodes, so the watch over evaluations does not see them. Calls are noted
while graphs are built, and nothing has to be evaluated. The rules were read out of MLX 0.32.4's wheel for Apple silicon
(`mlx_empire/model/attention/fused.py`); that queries and values have heads of one size is the CUDA sources' rule, taken
to hold on Metal. None was measured.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_empire.model.attention.fused import FALLBACK_VARIABLE, FUSED_HEAD_DIMS, MOST_WITHOUT_BACKWARD

ATTENTION = "scaled_dot_product_attention"
NORMS = ("rms_norm", "layer_norm", "rope", "cross_entropy")
DIFFERENTIATED = ("vjp", "grad", "value_and_grad")
FLOATS = (mx.float32, mx.float16, mx.bfloat16)
FUSED, COMPOSED, FORWARD = "a kernel of its own", "other nodes", "either; no backward"


@dataclass(frozen=True)
class FastCall:
    """One call; `head`, `value`: sizes of attention's heads; `mask`: none, text or array; `width`: queries."""

    name: str
    dtype: mx.Dtype
    differentiated: bool
    head: int = 0
    value: int = 0
    width: int = 0
    mask: str = "none"
    sinks: bool = False


def on_metal(call: FastCall) -> str:
    """`FUSED`, `COMPOSED`, `FORWARD`, or the error that it ends in."""
    if call.dtype not in FLOATS:
        return f"error: no kernel for {call.dtype}"
    if call.name != ATTENTION:
        return FUSED
    if not call.differentiated:
        return FORWARD
    fits = call.head == call.value and call.head in FUSED_HEAD_DIMS
    if not fits or call.mask == "array" or os.environ.get(FALLBACK_VARIABLE) == "1":
        return COMPOSED
    if call.width <= MOST_WITHOUT_BACKWARD:
        return "error: vector kernels do not produce a logsumexp"
    return "error: does not support VJP with respect to attention sinks" if call.sinks else FUSED


@contextmanager
def noted_calls() -> Iterator[set[FastCall]]:
    """Within it calls of `mx.fast` are noted, and whether they are made in what is differentiated."""
    found: set[FastCall] = set()
    depth = 0

    def attention(q: mx.array, k: mx.array, v: mx.array, **more: Any) -> mx.array:
        mask = more.get("mask")
        kind = "none" if mask is None else "text" if isinstance(mask, str) else "array"
        sizes = {"head": q.shape[-1], "value": v.shape[-1], "width": q.shape[-2]}
        sinks = more.get("sinks") is not None
        found.add(FastCall(ATTENTION, q.dtype, depth > 0, **sizes, mask=kind, sinks=sinks))
        return originals[ATTENTION](q, k, v, **more)

    def simple(name: str) -> Callable[..., mx.array]:
        def called(x: mx.array, *rest: Any, **more: Any) -> mx.array:
            found.add(FastCall(name, x.dtype, depth > 0))
            return originals[name](x, *rest, **more)

        return called

    def differentiating(name: str) -> Callable[..., Any]:
        def transformed(function: Callable[..., Any], *rest: Any, **more: Any) -> Any:
            def inner(*arguments: Any, **keywords: Any) -> Any:
                nonlocal depth
                depth += 1
                try:
                    return function(*arguments, **keywords)
                finally:
                    depth -= 1

            return transformations[name](inner, *rest, **more)

        return transformed

    originals = {name: getattr(mx.fast, name) for name in (ATTENTION, *NORMS)}
    transformations = {name: getattr(mx, name) for name in DIFFERENTIATED}
    try:
        setattr(mx.fast, ATTENTION, attention)
        for name in NORMS:
            setattr(mx.fast, name, simple(name))
        for name in DIFFERENTIATED:
            setattr(mx, name, differentiating(name))
        yield found
    finally:
        for name, original in originals.items():
            setattr(mx.fast, name, original)
        for name, original in transformations.items():
            setattr(mx, name, original)
