"""Started under the watch: what each way to ask for an array counts, as (blocking, asynchronous, stops)."""

from __future__ import annotations

import json
from collections.abc import Callable
from threading import Thread
from typing import Any

import mlx.core as mx
import numpy as np
from support.watching import evaluations


def counted(what: str, ask: Callable[[], Any]) -> Any:
    """Print what `ask` counts; returns its result."""
    before = evaluations()
    result = ask()
    print(
        json.dumps([what, [now - then for now, then in zip(evaluations(), before, strict=True)]]), flush=True
    )
    return result


def running(array: mx.array) -> mx.array:
    """A product that is handed over."""
    product = array @ array
    mx.async_eval(product)
    return product


if __name__ == "__main__":
    a = mx.random.normal((512, 512))
    mx.eval(a)
    counted("eval", lambda: mx.eval(a @ a))
    counted("item", lambda: a.sum().item())
    counted("numpy", lambda: np.array(a @ a))
    product = counted("async_eval", lambda: running(a))
    counted("numpy of what runs", lambda: np.array(product))
    counted("numpy again", lambda: np.array(product))
    product = running(a)
    counted("eval of what runs", lambda: mx.eval(product))
    other = Thread(target=np.array, args=(running(a),))
    counted("another thread", lambda: (other.start(), other.join()))
    counted("eval of what is there", lambda: mx.eval(a))
