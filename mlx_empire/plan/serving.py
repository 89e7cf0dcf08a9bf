"""What a model takes that only answers: its weights at rest, its adapters, and the cache of a conversation."""

from __future__ import annotations

from mlx_empire.model.spec import ITEM_BYTES, ModelSpec
from mlx_empire.plan.work import attention_layers

USABLE = 0.95  # of what a machine's GPU may use, for serving: the rest is the runtime's
PACKED = 4.5 / 16  # of 16 bits: codes of 4 bits, and half a bit of scales and biases for each
CACHE_BYTES = 2  # a key or value in the cache: bfloat16


def serving_room(limit_bytes: int) -> int:
    """Bytes that models may fill on a machine whose GPU may use so many."""
    return int(USABLE * limit_bytes)


def resting_bytes(spec: ModelSpec, *, trained: bool) -> int:
    """Bytes of the tensors that are trained (the adapters of a frozen base), or of those that are not."""
    tensors = (t for u in spec.units for t in u.tensors)
    return sum(t.size * ITEM_BYTES[t.dtype] for t in tensors if t.trainable == trained)


def cache_bytes_per_token(spec: ModelSpec) -> int:
    """Bytes of keys and values that one token leaves in all layers, as mlx-lm caches them; 0 without attention."""
    text = spec.text_config
    layers = attention_layers(spec)
    heads = int(text.get("num_attention_heads") or text.get("n_head") or 0)
    if not heads or not layers:
        return 0
    latent, rotary = int(text.get("kv_lora_rank") or 0), int(text.get("qk_rope_head_dim") or 0)
    if latent and spec.family == "deepseek_v3":
        return CACHE_BYTES * layers * (latent + rotary)
    if latent:  # keys and values are cached unpacked
        width = int(text["qk_nope_head_dim"]) + rotary + int(text["v_head_dim"])
        return CACHE_BYTES * layers * heads * width
    hidden = int(text.get("hidden_size") or text.get("n_embd") or 0)
    width = int(text.get("head_dim") or hidden // heads)
    groups = int(text.get("num_key_value_heads") or text.get("num_kv_heads") or heads)
    return CACHE_BYTES * layers * groups * 2 * width
