"""Vision-language folders that transformers saves: the language model in them has torch's loss on text.

The towers are as small as they can be; nothing reads them here but transformers. Needs torch: `make test-interop`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: run `make test-interop`")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from interop import test_families as plain  # noqa: E402

TOWER: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "embed_dim", "intermediate_size", "vision_output_dim", "mm_embed_dim"), 32
    ),
    **dict.fromkeys(("projector_input_dim", "projector_output_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "depth", "pooling_kernel_size"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "num_position_embeddings", "position_embedding_size"), 16),
    **{key: [0] for key in ("deepstack_visual_indexes", "fullatt_block_indexes")},
    **{"image_size": 28, "patch_size": 14, "max_position_embeddings": 64, "out_hidden_size": 64},
}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
# name -> (family, the language model's if it may be another than the usual one, what the latter needs)
WRAPPED: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    **{family: (family, None, {}) for family in ("gemma3", "llava", "qwen3_vl", "qwen3_vl_moe")},
    **{family: (family, None, {}) for family in ("qwen3_5", "qwen3_5_moe")},
    "gemma4": ("gemma4", None, {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}),
    "llama4": ("llama4", None, {"num_experts_per_tok": 1, "intermediate_size_mlp": 96}),
    "mistral3": ("mistral3", "mistral", plain.NO_WINDOW),
    "mistral3 of ministral3": ("mistral3", "ministral3", plain.NO_WINDOW),
    "qwen2_vl": ("qwen2_vl", None, SECTIONS),
}


def settings(family: str, text: str | None, needs: dict[str, Any]) -> Any:
    """transformers' configuration of a tiny model."""
    there = transformers.CONFIG_MAPPING[family]
    held = there().to_dict()
    asked: dict[str, Any] = {
        key: 250 for key in held if key.endswith(("token_id", "token_index")) and held[key] is not None
    }
    if held["vision_config"] is not None:
        vision = {k: TOWER.get(k, v) for k, v in held["vision_config"].items() if not isinstance(v, dict)}
        asked["vision_config"] = {**vision, **({"hidden_size": 64} if family == "qwen2_vl" else {})}
    language = plain.settings(text or held["text_config"]["model_type"], **needs)
    return there(**asked, text_config=language.to_dict())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", WRAPPED)
def test_the_first_loss_of_a_saved_folder_is_that_of_torch(name: str, dtype: str, tmp_path: Path) -> None:
    folder, kind = tmp_path / "saved", transformers.AutoModelForImageTextToText
    plain.torch_model(settings(*WRAPPED[name]), kind).to(getattr(torch, dtype)).save_pretrained(folder)
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    assert plain.our_loss(folder) == pytest.approx(plain.torch_loss(model), rel=1e-4)
