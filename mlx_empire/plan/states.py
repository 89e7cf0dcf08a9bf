"""Bytes of optimizer state by formula, for plans that are made without an optimizer at hand.

A run takes the optimizer's own answer (`ShardOptimizer.state_bytes`); a test holds this formula against it.
"""

from __future__ import annotations

from mlx_empire.plan.memory import StateBytes
from mlx_empire.plan.model import BLOCK
from mlx_empire.recipe.sections import OptimizerSection

_MOMENTS = {"adamw": ("m", "v"), "lion": ("m",), "sgd": ("m",)}
_CODES = {  # name of the moment -> (name, bytes per element, bytes per block of 64)
    "m": (("m_codes", 1, 0), ("m_scale", 0, 2)),
    "v": (("v_codes", 1, 0), ("v_floor", 0, 2), ("v_levels", 0, 1)),
}
_MASTERS = {  # beside a bfloat16 weight: name and bytes per element
    "exact": {"remainder": 2},
    "diet": {"short_remainder": 1},
    "fp32": {"master": 4},
    "none": {},
}


def planned_state_bytes(optimizer: OptimizerSection) -> StateBytes:
    """What `optimizer` keeps per interval: moments in 32 or 8 bits, and what completes bfloat16 to a master weight.

    `exact` is the other 16 bits of the float32 weight, `diet` 8 of them, `fp32` a whole copy, `none` nothing.
    """

    def state_bytes(elements: int, weight_dtype: str, *, quantised: bool) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for moment in _MOMENTS[optimizer.name]:
            if quantised and optimizer.state_bits == 8:
                parts = _CODES[moment]
                sizes |= {name: elements * each + elements // BLOCK * row for name, each, row in parts}
            else:
                sizes[moment] = 4 * elements
        if weight_dtype == "bfloat16":
            sizes |= {name: each * elements for name, each in _MASTERS[optimizer.master_weights].items()}
        return sizes

    return state_bytes
