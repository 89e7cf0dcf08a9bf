"""Vision-language folders that transformers saves: the language model in them has torch's loss on text, towers come
back beside a result, and PEFT's adapters go both ways.

The towers are as small as they can be; nothing reads them here but transformers. Needs torch: `make test-interop`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_empire.export.command import main
from mlx_empire.formats.export_folder import FolderWriter
from mlx_empire.formats.hf_folder import open_folder
from mlx_empire.formats.source import FolderSource
from mlx_empire.model.config import read_config
from mlx_empire.model.target import make_target
from mlx_empire.recipe.sections import TuningSection

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


# Their results are in mlx-lm's own layout, which a note of the export says.
MLX_LM_ONLY = ("qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
THEIRS = [name for name in WRAPPED if name not in MLX_LM_ONLY]
TOKENIZER = Path(__file__).parents[1] / "fixtures/tiny-llama-260k"
KIND = transformers.AutoModelForImageTextToText


def saved(name: str, folder: Path) -> Path:
    plain.torch_model(settings(*WRAPPED[name]), KIND).save_pretrained(folder)
    for file in TOKENIZER.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def opened(folder: Path) -> Any:
    """As transformers opens it; nothing of it is missing in the folder or left over."""
    model, report = KIND.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("name", THEIRS)
def test_a_result_is_opened_by_transformers_with_its_towers(name: str, tmp_path: Path) -> None:
    base, out = saved(name, tmp_path / "base"), tmp_path / "out"
    stored = open_folder(base).stored()
    target = make_target(read_config(base), TuningSection(), "base", "float32", stored)
    source = FolderSource(base, target.rebuild, target.spec)
    with FolderWriter(out, target.spec, target.rebuild, base) as writer:
        for index in range(len(target.spec.units)):
            writer.write_unit(index, {t.name: array for t, array in source.unit(index)})
    before, after = opened(base).state_dict(), opened(out).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", WRAPPED)
def test_an_adapter_of_peft_goes_to_mlx_lm_and_back(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: run `make test-interop`")
    base = saved(name, tmp_path / "base")
    torch.manual_seed(1)
    asked = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=r".*language_model.*\.(q_proj|o_proj|down_proj)",
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(opened(base), asked)
    expected = plain.torch_loss(adapted)
    assert expected != pytest.approx(plain.torch_loss(opened(base)), rel=1e-3)
    adapted.save_pretrained(tmp_path / "theirs")
    for way, source in (("mlx-lm", "theirs"), ("peft", "mlx-lm"), ("merge", "theirs")):
        assert main([way, str(tmp_path / source), str(tmp_path / way), "--model", str(base)]) == 0
    again = peft.PeftModel.from_pretrained(opened(base), tmp_path / "peft")
    assert plain.torch_loss(again.eval()) == pytest.approx(expected, rel=1e-5)
    report = again.load_adapter(str(tmp_path / "peft"), "again")
    assert not report.unexpected_keys
    assert not [key for key in report.missing_keys if "lora" in key]
    assert plain.our_loss(tmp_path / "merge") == pytest.approx(expected, rel=1e-4)
    if name in THEIRS:
        assert plain.torch_loss(opened(tmp_path / "merge")) == pytest.approx(expected, rel=1e-5)
