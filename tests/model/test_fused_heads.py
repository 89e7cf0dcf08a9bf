"""On a GPU the scaled-down model meets the kernels that the real model meets: its heads are fused where those are."""

from __future__ import annotations

import pytest
from metal.fast_calls import ATTENTION, noted_calls
from support import published
from support.tiny_models import tiny_config

from mlx_empire.engine import streamable
from mlx_empire.model.attention.fused import FUSED_HEAD_DIMS, MOST_WITHOUT_BACKWARD
from mlx_empire.model.scaled_down import scaled_down_config

# Grouped heads, sinks beside sliding windows, latent heads with a rotary part of their own.
NAMES = [
    "gpt-oss-20b-bf16",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama-3.1-8b", "deepseek-v3-671b")),
]
OTHERS = [
    "llama-3.1-8b",
    "deepseek-v3-671b",
    "llama-4-scout-109b",
    "qwen2.5-7b",
    "qwen3-next-80b-a3b",
    "mimo-v2-flash",
]


@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_heads_stay_fused_and_are_streamed_exactly(monkeypatch, name):
    monkeypatch.setattr(streamable, "computes_on_gpu", lambda: True)
    monkeypatch.setattr(streamable, "GPU_TOLERANCE", streamable.TOLERANCE)  # it is a CPU
    with noted_calls() as calls:
        streamable.verify_scaled_down(published.config_of(name), name)
    trained = [call for call in calls if call.name == ATTENTION and call.differentiated]
    assert trained
    assert all(call.head in FUSED_HEAD_DIMS and call.width > MOST_WITHOUT_BACKWARD for call in trained)


def test_on_a_cpu_heads_are_small():
    assert scaled_down_config(published.config_of("llama-3.1-8b"))["hidden_size"] == 64


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_fused_stays_fused_and_nothing_else_becomes_so(name):
    config = published.config_of(name)
    small = scaled_down_config(config, fused=FUSED_HEAD_DIMS)
    sizes = ("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "swa_head_dim")
    large, small = (c.get("text_config", c) for c in (config, small))
    pairs = {(large[size], small[size]) for size in sizes if large.get(size)}
    pairs.add(tuple(c["hidden_size"] // c["num_attention_heads"] for c in (large, small)))
    assert all((a in FUSED_HEAD_DIMS) == (b in FUSED_HEAD_DIMS) for a, b in pairs), pairs


def test_the_tolerance_is_a_gpus_where_one_computes(monkeypatch):
    """TF32, which some GPUs multiply float32 in, rounds to 1e-3."""
    original = streamable._whole

    def off(model, batch):
        loss, gradients = original(model, batch)
        return loss, {path: 1.001 * gradient for path, gradient in gradients.items()}

    monkeypatch.setattr(streamable, "_whole", off)
    config = tiny_config("llama", num_hidden_layers=1)
    with pytest.raises(streamable.UserError, match="would be trained wrongly"):
        streamable.verify_scaled_down(config, "llama")
    monkeypatch.setattr(streamable, "computes_on_gpu", lambda: True)
    streamable.verify_scaled_down(config, "llama")
