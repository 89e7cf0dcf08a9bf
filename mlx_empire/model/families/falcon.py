"""Falcon (arXiv:2311.16867), `model_type: falcon`: both decoder architectures, rotary positions or ALiBi.

One matrix makes queries, keys and values: for each group of heads its queries' rows, then one key's and one value's.
So the three published layouts are one: multi-query is one group, multi-head as many as heads, the new decoder
`num_kv_heads`. Attention and perceptron stand side by side, but in models without `parallel_attn`. The dropouts of the
configuration are left out, as mlx-lm's modules leave theirs out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, scaled_dot_product_attention
from mlx_lm.models.rope_utils import initialize_rope

from mlx_empire.model.families.alibi import alibi_mask, alibi_slopes
from mlx_empire.model.families.parts import CausalModel, activation_of, through


@dataclass
class ModelArgs(BaseModelArgs):
    """The keys of config.json that are read; those without a default must be there."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_kv_heads: int | None = None
    num_ln_in_parallel_attn: int | None = None
    layer_norm_epsilon: float = 1e-5
    alibi: bool = False
    new_decoder_architecture: bool = False
    multi_query: bool = True
    parallel_attn: bool = True
    bias: bool = False
    ffn_hidden_size: int | None = None
    activation: str = "gelu"
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        """Numbers that follow from others. ValueError for a combination of which transformers has no forward pass."""
        if self.ffn_hidden_size is None:
            self.ffn_hidden_size = 4 * self.hidden_size
        new = self.new_decoder_architecture
        if self.num_ln_in_parallel_attn is None:
            self.num_ln_in_parallel_attn = 2 if new else 1
        if new and not self.parallel_attn:
            raise ValueError(
                "parallel_attn: false: the new decoder architecture has no other; set it to true"
            )
        if self.num_ln_in_parallel_attn not in ((1, 2) if new else (1,)):
            allowed = "1 or 2" if new else "1 without new_decoder_architecture"
            raise ValueError(f"num_ln_in_parallel_attn: {self.num_ln_in_parallel_attn}: expected {allowed}")
        heads = self.num_attention_heads
        if self.hidden_size % heads or heads % self.groups:
            raise ValueError(
                f"num_attention_heads: {heads}: must divide hidden_size ({self.hidden_size}) and be a multiple of "
                f"num_kv_heads ({self.groups})"
            )

    @property
    def groups(self) -> int:
        """How many heads of keys and values there are."""
        if self.new_decoder_architecture:
            return self.num_kv_heads or self.num_attention_heads
        return 1 if self.multi_query else self.num_attention_heads


class FalconAttention(nn.Module):
    """Causal attention; with ALiBi each key's position is added to its scores, else queries and keys are rotated."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.groups, self.per_group = args.groups, args.num_attention_heads // args.groups
        self.head_dim = args.hidden_size // args.num_attention_heads
        self.scale = self.head_dim**-0.5
        rows = (args.num_attention_heads + 2 * args.groups) * self.head_dim
        self.query_key_value = nn.Linear(args.hidden_size, rows, bias=args.bias)
        self.dense = nn.Linear(args.hidden_size, args.hidden_size, bias=args.bias)
        self.slopes = alibi_slopes(args.num_attention_heads) if args.alibi else None
        if not args.alibi:
            self.rope = initialize_rope(
                self.head_dim, args.rope_theta, False, args.rope_scaling, args.max_position_embeddings
            )

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """(rows, width, hidden) -> the same; `mask`: "causal" or booleans, `cache`: mlx-lm's, of earlier tokens."""
        q, k, v = self._split(self.query_key_value(x))
        if self.slopes is None:
            offset = {} if cache is None else {"offset": cache.offset}
            q, k = self.rope(q, **offset), self.rope(k, **offset)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        if self.slopes is not None:
            mask = alibi_mask(self.slopes, mask, q.shape[2], k.shape[2], self.scale, q.dtype)
        out = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=mask)
        result: mx.array = self.dense(out.swapaxes(1, 2).reshape(x.shape))
        return result

    def _split(self, fused: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """(rows, width, all) -> (rows, heads or groups, width, head_dim) of queries, keys and values."""
        rows, width, _ = fused.shape
        each = fused.reshape(rows, width, self.groups, self.per_group + 2, self.head_dim)
        q, k, v = mx.split(each, [self.per_group, self.per_group + 1], axis=3)
        q, k, v = (part.reshape(rows, width, -1, self.head_dim).swapaxes(1, 2) for part in (q, k, v))
        return q, k, v


class FalconMLP(nn.Module):
    """A perceptron with one hidden layer."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        assert args.ffn_hidden_size is not None
        self.dense_h_to_4h = nn.Linear(args.hidden_size, args.ffn_hidden_size, bias=args.bias)
        self.dense_4h_to_h = nn.Linear(args.ffn_hidden_size, args.hidden_size, bias=args.bias)
        self.act = activation_of("activation", args.activation)

    def __call__(self, x: mx.array) -> mx.array:
        """(.., hidden) -> the same."""
        out: mx.array = self.dense_4h_to_h(self.act(self.dense_h_to_4h(x)))
        return out


class FalconLayer(nn.Module):
    """A decoder layer: attention and perceptron side by side on one norm or two, or one after the other."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.self_attention, self.mlp = FalconAttention(args), FalconMLP(args)
        self.parallel, self.apart = args.parallel_attn, args.num_ln_in_parallel_attn == 2
        names = ["ln_attn", "ln_mlp"] if self.apart else ["input_layernorm"]
        for name in names if self.parallel else ["input_layernorm", "post_attention_layernorm"]:
            self[name] = nn.LayerNorm(args.hidden_size, args.layer_norm_epsilon)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """(rows, width, hidden) -> the same."""
        out: mx.array
        if not self.parallel:
            x = x + self.self_attention(self.input_layernorm(x), mask, cache)
            out = x + self.mlp(self.post_attention_layernorm(x))
            return out
        attended = self.ln_attn(x) if self.apart else self.input_layernorm(x)
        passed = self.ln_mlp(x) if self.apart else attended
        out = x + (self.mlp(passed) + self.self_attention(attended, mask, cache))
        return out


class FalconModel(nn.Module):
    """Everything below the head."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        self.h = [FalconLayer(args) for _ in range(args.num_hidden_layers)]
        self.ln_f = nn.LayerNorm(args.hidden_size, args.layer_norm_epsilon)

    def __call__(self, inputs: mx.array, cache: Sequence[Any] | None = None) -> mx.array:
        """(rows, width) tokens -> (rows, width, hidden)."""
        out: mx.array = self.ln_f(through(self.h, self.word_embeddings(inputs), cache))
        return out


class Model(CausalModel):
    """Falcon with its head, tied to the embedding or not."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args, "transformer", FalconModel(args), "h", "word_embeddings")
