"""Decides what is known of MLX's fused attention on Metal: for which heads it is, and what it cannot do.

The conditions stand here and nowhere else. Read out of MLX 0.32.4's wheel for Apple silicon
(`ScaledDotProductAttention::use_fallback` and its vjp), not measured: in training without an array mask, forward and
backward of these head dims are fused and make no scores; any other head dim, and any array mask, makes them. The fused
forward that a backward needs does not exist for 8 positions or fewer. Attention sinks have no fused backward, and MLX
takes the other way only where the environment says so, which it reads at each call.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx

from mlx_empire.errors import UserError

READ_IN = "0.32.4"
FUSED_HEAD_DIMS = frozenset((64, 72, 80, 96, 128, 192, 256))
FUSED_UNEQUAL_DIMS = frozenset(((96, 64),))  # of queries and keys, and of values
FUSED_DTYPES = frozenset((mx.float16, mx.bfloat16, mx.float32))
MOST_WITHOUT_BACKWARD = 8  # positions
SINKS = ("sinks", "attention_sink_bias")
FALLBACK_VARIABLE = "MLX_SDPA_VJP_FALLBACK"


def attention_is_fused(text_config: Mapping[str, Any]) -> bool:
    """Whether the attention of a model with this configuration is fused in training, its masks permitting."""
    head = text_config.get("head_dim")
    if head is None:
        width = text_config.get("hidden_size") or text_config.get("n_embd")
        heads = text_config.get("num_attention_heads") or text_config.get("n_head")
        head = int(width) // int(heads) if width and heads else None
    return head in FUSED_HEAD_DIMS


def takes(q: mx.array, v: mx.array, sinks: mx.array | None) -> bool:
    """Whether forward and backward of causal attention of these arrays (rows, heads, S, D) are fused on Metal."""
    dims = q.shape[-1], v.shape[-1]
    fits = (dims[0] == dims[1] and dims[0] in FUSED_HEAD_DIMS) or dims in FUSED_UNEQUAL_DIMS
    return fits and sinks is None and q.dtype in FUSED_DTYPES and q.shape[2] > MOST_WITHOUT_BACKWARD


def refuse_too_short(sequence_length: int) -> None:
    """UserError for rows on which Metal cannot differentiate attention."""
    if sequence_length <= MOST_WITHOUT_BACKWARD:
        raise UserError(
            f"data.sequence_length: {sequence_length}: attention on Metal has no backward for "
            f"{MOST_WITHOUT_BACKWARD} positions or fewer; use {MOST_WITHOUT_BACKWARD + 1} or more"
        )


def allow_sinks(names: Iterable[str]) -> None:
    """Let MLX differentiate attention with sinks where a parameter is one; before the first backward of the model."""
    if any(name.rpartition(".")[2] in SINKS for name in names):
        os.environ.setdefault(FALLBACK_VARIABLE, "1")
