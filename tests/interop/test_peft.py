"""Adapters between mlx-lm and PEFT on torch, both ways: the same logits.

Needs torch and peft, which `make test` does not install: run it by `make test-interop`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from support.tiny_models import tiny_config

from mlx_empire.export.command import main
from mlx_empire.train import command as train

torch = pytest.importorskip("torch", reason="torch is not installed: run `make test-interop`")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed: run `make test-interop`")

RECIPE = """\
model: {path: base}
tuning: {rank: 4, layers: 3}
data: {path: rows.jsonl, format: tokens, sequence_length: 8}
batch: {global_size: 2}
optimizer: {learning_rate: 3.0e-2}
run: {dir: run, steps: 4}
"""
TOKENS = [[5, 9, 250, 17, 3, 3, 0, 88], [1, 2, 3, 4, 5, 6, 7, 8]]
TOKENIZER = Path(__file__).parents[1] / "fixtures/tiny-llama-260k"
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": EVERY},
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 6, "target_modules": EVERY, "use_dora": True},
    "head and embedding": {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "some layers": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [1, 3],
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    config = tiny_config("llama", bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model(**config)
    transformers.AutoModelForCausalLM.from_config(settings).float().save_pretrained(folder)
    for file in TOKENIZER.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "rope_theta": 10000.0, "torch_dtype": "float32"})
    )
    return folder


def torch_base(base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def mlx_logits(folder: Path, adapter: Path | None = None) -> np.ndarray:
    model, _ = mlx_lm.load(str(folder), adapter_path=str(adapter) if adapter else None)
    return np.array(model(mx.array(TOKENS)))


def trained(base: Path, settings: dict[str, Any]) -> Any:
    """An adapter of PEFT's after three steps on torch."""
    torch.manual_seed(1)
    model = peft.get_peft_model(torch_base(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    tokens = torch.tensor(TOKENS)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_goes_from_torch_to_mlx_and_back(name: str, base: Path, tmp_path: Path) -> None:
    model = trained(base, CASES[name])
    expected = torch_logits(model)
    assert np.abs(expected - torch_logits(torch_base(base))).max() > 0.05
    model.save_pretrained(tmp_path / "theirs")
    for way, source in (("mlx-lm", "theirs"), ("peft", "mlx-lm"), ("merge", "theirs")):
        command = [way, str(tmp_path / source), str(tmp_path / way), "--model", str(base)]
        assert main(command) == 0
    assert np.abs(mlx_logits(base, tmp_path / "mlx-lm") - expected).max() < 1e-4
    assert np.abs(mlx_logits(tmp_path / "merge") - expected).max() < 1e-4
    assert np.abs(torch_logits(torch_base(tmp_path / "merge")) - expected).max() < 1e-4
    again = peft.PeftModel.from_pretrained(torch_base(base), tmp_path / "peft")
    assert np.abs(torch_logits(again) - expected).max() < 1e-4
    report = again.load_adapter(str(tmp_path / "peft"), "again")
    assert not report.unexpected_keys
    assert not [key for key in report.missing_keys if "lora" in key]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_a_run_leaves_is_opened_by_peft(
    kind: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`final/` by mlx-lm and `final/peft` by PEFT on torch: the same logits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_EMPIRE_CACHE", str(tmp_path / "cache"))
    Path("rows.jsonl").write_text("".join(json.dumps({"tokens": row}) + "\n" for row in TOKENS))
    Path("recipe.yaml").write_text(RECIPE)
    assert train.main(["recipe.yaml", f"model.path={base}", f"tuning.type={kind}"]) == 0
    expected = mlx_logits(base, tmp_path / "run/final")
    assert np.abs(expected - mlx_logits(base)).max() > 0.05
    model = peft.PeftModel.from_pretrained(torch_base(base), tmp_path / "run/final/peft")
    assert np.abs(torch_logits(model) - expected).max() < 1e-4
    assert model.peft_config["default"].base_model_name_or_path == str(base)
