"""OLMo 1 (arXiv:2402.00838) as transformers saves it: `model_type: olmo`, Llama's matrices.

Its layer norms have no parameters, and it may clip queries, keys and values (`clip_qkv`). mlx-lm's module of this name
is for AI2's own older layout, whose configuration has `d_model`; it needs the Python module hf_olmo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, scaled_dot_product_attention
from mlx_lm.models.rope_utils import initialize_rope

from mlx_empire.model.families.parts import CausalModel, activation_of, through

NORM_EPS = 1e-5  # no key of the configuration says it


@dataclass
class ModelArgs(BaseModelArgs):
    """The keys of config.json that are read; those without a default must be there."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    clip_qkv: float | None = None
    attention_bias: bool = False
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> ModelArgs:
        """ValueError for the layout of AI2's own package."""
        if "d_model" in params and "hidden_size" not in params:
            raise ValueError(
                "d_model: config.json is in AI2's own layout, for which mlx-lm's olmo needs the Python module hf_olmo; "
                "fetch the model as transformers has it (allenai/OLMo-7B-Instruct-hf has hidden_size)"
            )
        args: ModelArgs = super().from_dict(params)
        return args

    def __post_init__(self) -> None:
        """ValueError for heads that do not divide what they must."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads}: must divide hidden_size ({self.hidden_size}) and "
                f"be a multiple of num_key_value_heads ({self.num_key_value_heads})"
            )


class OlmoAttention(nn.Module):
    """Causal attention with rotary positions over heads that may share keys and values."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        assert args.num_key_value_heads is not None
        width, bias = args.hidden_size // args.num_attention_heads, args.attention_bias
        self.heads, self.groups, self.clip = args.num_attention_heads, args.num_key_value_heads, args.clip_qkv
        self.scale = width**-0.5
        self.q_proj = nn.Linear(args.hidden_size, args.hidden_size, bias=bias)
        self.k_proj = nn.Linear(args.hidden_size, self.groups * width, bias=bias)
        self.v_proj = nn.Linear(args.hidden_size, self.groups * width, bias=bias)
        self.o_proj = nn.Linear(args.hidden_size, args.hidden_size, bias=bias)
        self.rope = initialize_rope(
            width, args.rope_theta, False, args.rope_scaling, args.max_position_embeddings
        )

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """(rows, width, hidden) -> the same; `mask`: "causal" or an array, `cache`: mlx-lm's, of earlier tokens."""
        given = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        if self.clip is not None:
            given = [mx.clip(each, -self.clip, self.clip) for each in given]
        counts = (self.heads, self.groups, self.groups)
        rows, width, _ = x.shape
        q, k, v = (
            each.reshape(rows, width, count, -1).swapaxes(1, 2)
            for each, count in zip(given, counts, strict=True)
        )
        if cache is None:
            q, k = self.rope(q), self.rope(k)
        else:
            q, k = self.rope(q, offset=cache.offset), self.rope(k, offset=cache.offset)
            k, v = cache.update_and_fetch(k, v)
        out = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=mask)
        result: mx.array = self.o_proj(out.swapaxes(1, 2).reshape(rows, width, -1))
        return result


class OlmoMLP(nn.Module):
    """A gated perceptron."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)
        self.act = activation_of("hidden_act", args.hidden_act)

    def __call__(self, x: mx.array) -> mx.array:
        """(.., hidden) -> the same."""
        out: mx.array = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return out


class OlmoLayer(nn.Module):
    """A decoder layer; its two norms have no parameters."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.self_attn, self.mlp = OlmoAttention(args), OlmoMLP(args)
        self.input_layernorm = nn.LayerNorm(args.hidden_size, NORM_EPS, affine=False)
        self.post_attention_layernorm = nn.LayerNorm(args.hidden_size, NORM_EPS, affine=False)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """(rows, width, hidden) -> the same."""
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        out: mx.array = x + self.mlp(self.post_attention_layernorm(x))
        return out


class OlmoModel(nn.Module):
    """Everything below the head."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [OlmoLayer(args) for _ in range(args.num_hidden_layers)]
        self.norm = nn.LayerNorm(args.hidden_size, NORM_EPS, affine=False)

    def __call__(self, inputs: mx.array, cache: Sequence[Any] | None = None) -> mx.array:
        """(rows, width) tokens -> (rows, width, hidden)."""
        out: mx.array = self.norm(through(self.layers, self.embed_tokens(inputs), cache))
        return out


class Model(CausalModel):
    """OLMo 1 with its head, tied to the embedding or not."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args, "model", OlmoModel(args), "layers", "embed_tokens")
