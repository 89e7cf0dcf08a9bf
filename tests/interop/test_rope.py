"""Folders as transformers 5 saves them (`rope_parameters`): the command's first loss is the one that torch computes.

Weights are made large, so that every family's loss depends on its RoPE: torch's loss with another theta is far off.
Needs torch, which `make test` does not install: run it by `make test-interop`.
"""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model
from support.tiny_models import tiny_config
from train.launching import Workspace, jsonl, step_records

torch = pytest.importorskip("torch", reason="torch is not installed: run `make test-interop`")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

ROWS = [[1 + (31 * i * i + 7 * j * j + 3 * i * j) % 250 for j in range(120)] for i in range(2)]  # 0 pads
SCALE = 12.0
THETA = {"rope_theta": 500_000.0, "rope_type": "default"}
LLAMA3 = {
    **THETA,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {**THETA, "rope_type": "linear", "factor": 2.0}
# Rows longer than the original length: transformers then takes the long factors, which mlx-lm always takes.
LONG = {
    **THETA,
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 0.3 * i for i in range(8)],
    "original_max_position_embeddings": 64,
}
LOCAL = {"sliding_attention": {"rope_type": "default", "rope_theta": 30_000.0}}

# name -> (model_type, rope_parameters, other settings)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", THETA, {}),
    "llama-llama3": ("llama", LLAMA3, {}),
    "llama-linear": ("llama", LINEAR, {}),
    "llama-dynamic": ("llama", {**LINEAR, "rope_type": "dynamic"}, {}),
    "mistral": ("mistral", THETA, {"sliding_window": None}),
    "mixtral": ("mixtral", THETA, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", THETA, {}),
    "qwen2-yarn": ("qwen2", YARN, {}),
    "qwen3": ("qwen3", THETA, {}),
    "qwen3-yarn": ("qwen3", YARN, {}),
    "phi3": ("phi3", THETA, {}),
    "phi3-half": ("phi3", {**THETA, "partial_rotary_factor": 0.5}, {}),
    "phi3-longrope": ("phi3", LONG, {"original_max_position_embeddings": 64}),
    "smollm3": ("smollm3", THETA, {"no_rope_layers": [1, 1, 1, 0]}),
    "seed_oss": ("seed_oss", THETA, {}),
    "olmo2": ("olmo2", THETA, {}),
    "olmo3-yarn": ("olmo3", {"full_attention": YARN, "sliding_attention": THETA}, {"sliding_window": 64}),
    "gemma": ("gemma", THETA, {"tie_word_embeddings": True, "hidden_act": "gelu_python"}),
    "gemma2": ("gemma2", THETA, {"tie_word_embeddings": True, "query_pre_attn_scalar": 16}),
    "gemma3_text-linear": (
        "gemma3_text",
        {"full_attention": LINEAR, **LOCAL},
        {"query_pre_attn_scalar": 16, "num_hidden_layers": 6},
    ),
    "cohere2": ("cohere2", THETA, {"tie_word_embeddings": True, "sliding_window": 64}),
    "granite-llama3": ("granite", LLAMA3, {}),
    "starcoder2": ("starcoder2", THETA, {"tie_word_embeddings": True, "hidden_act": "gelu_python"}),
    "stablelm": ("stablelm", {**THETA, "partial_rotary_factor": 0.5}, {}),
    "glm4": ("glm4", {**THETA, "partial_rotary_factor": 0.5}, {}),
    "gpt_neox": (
        "gpt_neox",
        {**THETA, "partial_rotary_factor": 0.5},
        {"hidden_act": "gelu_python", "intermediate_size": 256},
    ),
    "deepseek_v3": ("deepseek_v3", THETA, {"rope_interleave": True}),
    "exaone4": ("exaone4", THETA, {"sliding_window": 64}),
    "helium": ("helium", THETA, {}),
    "ernie4_5": ("ernie4_5", THETA, {}),
}
SHARED = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "tie_word_embeddings",
]


def settings(family: str, rope: dict[str, Any], more: dict[str, Any]) -> Any:
    """transformers' configuration of a tiny model."""
    base = tiny_config("llama")
    if family == "deepseek_v3":
        base = tiny_config(family)
    shared = {k: v for k, v in base.items() if k in SHARED or family == "deepseek_v3"}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    asked = {**shared, **special, **more, "rope_parameters": json.loads(json.dumps(rope))}
    for old in ("rope_theta", "rope_scaling", "model_type"):
        asked.pop(old, None)
    return transformers.AutoConfig.for_model(family, **asked)


def torch_loss(model: Any) -> float:
    """Mean cross entropy over all targets of ROWS."""
    tokens = torch.tensor(ROWS)
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits.float()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, dict[str, tuple[float, float]]]:
    """Every case as a folder, trained for one step; and torch's loss, with its own theta and with another."""
    made = Workspace(tmp_path_factory.mktemp("rope"))
    made.write("rows/train.jsonl", jsonl({"tokens": row} for row in ROWS))
    expected: dict[str, tuple[float, float]] = {}
    for name, (family, rope, more) in CASES.items():
        torch.manual_seed(0)
        config = settings(family, rope, more)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        model = model.float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(SCALE if parameter.ndim > 1 else 1.0)
        model.save_pretrained(made.folder / name)
        assert "rope_theta" not in json.loads((made.folder / name / "config.json").read_text())
        other = json.loads(json.dumps(rope).replace("500000.0", "2.0").replace("30000.0", "2.0"))
        twin = transformers.AutoModelForCausalLM.from_config(
            settings(family, other, more), attn_implementation="eager"
        )
        twin.load_state_dict(model.state_dict())
        expected[name] = torch_loss(model), torch_loss(twin.float().eval())
    made.write(
        "recipe.yaml",
        "model: {dtype: float32, path: llama}\n"
        "data: {path: rows, format: tokens, sequence_length: 119}\n"
        "batch: {global_size: 2, micro_size: 2}\n"
        "optimizer: {learning_rate: 1.0e-8}\n"
        "run: {dir: run, steps: 1, resume: never}\n",
    )
    return made, expected


@pytest.fixture(scope="module")
def losses(place: tuple[Workspace, dict[str, tuple[float, float]]]) -> dict[str, float]:
    made, _ = place
    commands = {n: ["recipe.yaml", f"model.path={n}", f"run.dir=run-{n}"] for n in CASES}
    outcomes = made.train_many(commands)[0]
    found = {}
    for name, outcome in outcomes.items():
        if outcome.code == 0:
            found[name] = step_records(made.folder / f"run-{name}")[0]["loss"]
        else:
            print(name, outcome.stderr[-400:])
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_first_loss_is_that_of_torch(
    name: str, place: tuple[Workspace, dict[str, tuple[float, float]]], losses: dict[str, float]
) -> None:
    right, wrong = place[1][name]
    assert abs(wrong - right) > 5e-4 * right, "the case does not depend on its RoPE"
    assert losses[name] == pytest.approx(right, rel=1e-4)


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"gpt_neox"}))  # its layout is mlx-lm's own
def test_what_is_exported_opens_with_the_same_rope_in_both(
    name: str, place: tuple[Workspace, dict[str, tuple[float, float]]], losses: dict[str, float]
) -> None:
    """After one step of almost nothing mlx-lm and transformers compute the first loss from the exported folder."""
    assert name in losses
    made, expected = place
    final = made.folder / f"run-{name}" / "final"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        final, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = mx.array(ROWS)
    logits = load_model(final)[0](tokens[:, :-1]).astype(mx.float32)
    ours = np.array(logits).reshape(-1, logits.shape[-1])
    here = torch.nn.functional.cross_entropy(torch.tensor(ours), torch.tensor(ROWS)[:, 1:].flatten())
    there = torch_loss(model)
    assert float(here) == pytest.approx(there, rel=1e-4)
    assert there == pytest.approx(expected[name][0], rel=1e-4)
