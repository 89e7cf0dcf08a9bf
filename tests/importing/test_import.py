"""`mlx-empire import`: each line of another trainer's configuration has a verdict, and the recipe says what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.rows import MODEL

from mlx_empire.cli import main as cli
from mlx_empire.importing.packing_error import dynamic_levels, nf4, nf4_levels, packing_error
from mlx_empire.recipe.load import load_recipe

# The keys and values of the owner's configuration for a qlora of OLMo, in its nesting.
NESTED = """\
adapter:
  method: "qlora"

  # of the adapters
  lora:
    r: 16
    alpha: 32
    dropout: 0.05
    bias: "none"
    task_type: "CAUSAL_LM"
    target_modules:
      - "q_proj"
      - "k_proj"
      - "v_proj"
      - "o_proj"
      - "gate_proj"
      - "up_proj"
      - "down_proj"
  quantization:
    load_in_4bit: true
    bnb_4bit_compute_dtype: "bfloat16"
    bnb_4bit_use_double_quant: true
    bnb_4bit_quant_type: "nf4"

training:
  num_train_epochs: 2
  learning_rate: 0.0002
  lr_scheduler_type: "cosine"
  warmup_ratio: 0.03
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 16
  gradient_checkpointing: true
  optim: "paged_adamw_8bit"
  max_grad_norm: 1.0
  gradient_checkpointing_kwargs:
    use_reentrant: false

data:
  max_seq_length: 2048
  packing: true

model:
  base_model_id: "allenai/OLMo-7B-Instruct"
  torch_dtype: "auto"
  device_map: "auto"
  trust_remote_code: true
"""
REPLACED = {"bnb_4bit_use_double_quant", "bnb_4bit_quant_type", "optim", "use_reentrant", "device_map"}
# Published with bitsandbytes: what NF4's formula must give.
PUBLISHED = """-1.0 -0.6961928 -0.5250731 -0.3949175 -0.2844414 -0.1847734 -0.0910500 0.0 0.0795803 0.1609302 0.2461123
0.3379152 0.4407098 0.5626170 0.7229568 1.0"""


def imported(folder: Path, text: str, *words: str) -> dict[str, Any]:
    (folder / "theirs.yaml").write_text(text)
    asked = [str(folder / "theirs.yaml"), "--data", "rows.jsonl", "--out", str(folder / "ours.yaml")]
    assert cli(["import", *asked, "--json", str(folder / "told.json"), *words]) == 0
    found: dict[str, Any] = json.loads((folder / "told.json").read_text())
    return found


def test_every_line_of_the_owner_s_configuration_is_mapped_replaced_or_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = imported(tmp_path, NESTED, "--model", str(MODEL))
    says = [
        n
        for n, line in enumerate(NESTED.splitlines(), 1)
        if line.strip() and not line.strip().startswith("#")
    ]
    assert [one["line"] for one in told["lines"]] == says
    by_key = {one["key"].rpartition(".")[2]: one for one in told["lines"]}
    assert {key for key, one in by_key.items() if one["verdict"] == "replaced"} == REPLACED
    assert {key for key, one in by_key.items() if one["verdict"] == "not possible"} == {"trust_remote_code"}
    assert "no code of a model's folder is run" in by_key["trust_remote_code"]["why"]
    headings = {
        "adapter",
        "lora",
        "quantization",
        "training",
        "gradient_checkpointing_kwargs",
        "data",
        "model",
    }
    assert {key for key, one in by_key.items() if one["verdict"] == "heading"} == headings
    assert told["added"] == {
        "data.path": "rows.jsonl",
        "run.dir": "runs/theirs",
        "model.path": str(MODEL),
    }
    said = capsys.readouterr().out
    assert "41 lines: 7 heading, 28 mapped, 5 replaced, 1 not possible" in said
    assert f"NF4 with double quantisation {told['error']['nf4']:.4f} in 4.127 bits" in said


def test_the_recipe_says_what_the_configuration_says(tmp_path: Path) -> None:
    imported(tmp_path, NESTED)
    found = load_recipe(tmp_path / "ours.yaml")
    tuning, optimizer, batch = found.tuning, found.optimizer, found.batch
    assert (tuning.type, tuning.bits, tuning.rank, tuning.alpha, tuning.dropout) == ("qlora", 4, 16, 32, 0.05)
    assert tuning.targets == tuple(re.findall(r"\w+_proj", NESTED))
    assert (optimizer.name, optimizer.state_bits, optimizer.learning_rate) == ("adamw", 8, 2e-4)
    assert (optimizer.clip_norm, batch.micro_size, batch.global_size) == (1.0, 1, 16)
    assert (str(found.run.steps), str(found.schedule.warmup), found.schedule.type) == ("2ep", "3%", "cosine")
    assert (found.data.sequence_length, found.data.packing) == (2048, True)
    assert (found.model.source, found.model.dtype) == ("allenai/OLMo-7B-Instruct@main", "bfloat16")
    assert found.memory.gradient_checkpointing is True


def test_pefts_own_file_and_flat_arguments_are_read_too(tmp_path: Path) -> None:
    peft = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "use_dora": True,
        "target_modules": ["q_proj"],
        "bias": "all",
        "modules_to_save": None,
        "megatron_core": "megatron.core",
        "base_model_name_or_path": str(MODEL),
    }
    told = imported(tmp_path, json.dumps(peft))
    not_possible = [one["key"] for one in told["lines"] if one["verdict"] == "not possible"]
    assert not_possible == ["bias", "megatron_core"]
    found = load_recipe(tmp_path / "ours.yaml")
    assert (found.tuning.type, found.tuning.rank, found.tuning.alpha) == ("dora", 4, 8)
    assert (str(found.model.path), str(found.run.steps)) == (str(MODEL), "3ep")
    (tmp_path / "ours.yaml").unlink()
    flat = "model_name_or_path: m\nmax_steps: 70\nnum_train_epochs: 3\nadam_beta2: 0.95\nsave_steps: 10\n"
    told = imported(tmp_path, flat + "learning_rate: fast\nfp16: true\noptim: adafactor\nseed: 3\n")
    verdicts = {one["key"]: one["verdict"] for one in told["lines"]}
    assert [key for key, one in verdicts.items() if one == "not possible"] == ["learning_rate", "optim"]
    assert verdicts["fp16"] == "replaced"
    found = load_recipe(tmp_path / "ours.yaml")
    assert (str(found.run.steps), found.optimizer.betas, found.run.seed) == ("70", (0.9, 0.95), 3)


def test_lines_that_contradict_one_another_are_named(tmp_path: Path) -> None:
    told = imported(tmp_path, "method: lora\nload_in_4bit: true\nlora_r: 8\nr: 16\n")
    assert [(one["verdict"], one["why"]) for one in told["lines"][2:]] == [
        ("mapped", ""),
        ("not possible", "tuning.rank: line 3 says 8"),
    ]
    assert load_recipe(tmp_path / "ours.yaml").tuning.type == "qlora"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "theirs.yaml:1: no keys are in it"),
        ("[1]", "theirs.yaml:1: no keys are in it"),
        ("a: [", "theirs.yaml:"),
    ],
)
def test_what_is_no_configuration_is_one_line(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        imported(tmp_path, text)
    assert ended.value.code == 64
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "ours.yaml").exists()


def test_a_recipe_that_is_there_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ours.yaml").write_text("mine")
    with pytest.raises(SystemExit):
        imported(tmp_path, NESTED)
    assert "is there already, and is left as it is" in capsys.readouterr().err
    assert (tmp_path / "ours.yaml").read_text() == "mine"


def test_nf4_s_levels_are_those_that_are_published() -> None:
    assert np.allclose(nf4_levels(), [float(one) for one in PUBLISHED.split()], atol=1e-6)
    levels = dynamic_levels()
    assert len(levels) == len(set(levels)) == 256
    assert np.allclose(levels[-3:], [0.97890625, 0.99296875, 1.0])


def test_both_errors_are_what_a_plain_loop_finds(tmp_path: Path) -> None:
    """Of one matrix, block by block and weight by weight in float64."""
    rng = np.random.default_rng(7)
    weights = rng.standard_normal((4, 128)).astype(np.float32)
    (tmp_path / "config.json").write_text("{}")
    arrays = {"model.layers.0.mlp.up_proj.weight": mx.array(weights), "lm_head.weight": mx.ones((4, 64))}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays)
    blocks = weights.astype(np.float64).reshape(-1, 64)
    constants = [max(abs(w) for w in block) for block in blocks]
    mean = sum(constants) / len(constants)
    largest = max(abs(a - mean) for a in constants)
    codes = dynamic_levels().astype(np.float64)
    kept = [mean + largest * min(codes, key=lambda d, a=a: abs((a - mean) / largest - d)) for a in constants]
    levels = [float(one) for one in PUBLISHED.split()]
    expected = [
        [a * min(levels, key=lambda c, w=w, a=a: abs(w / a - c)) for w in block]
        for block, a in zip(blocks, kept, strict=True)
    ]
    assert np.allclose(nf4(weights).reshape(-1, 64), expected, atol=1e-4)
    grouped = []
    for (
        block
    ) in blocks:  # affine: 16 even steps from the least weight to the greatest, within MLX's choice of a zero
        step = (block.max() - block.min()) / 15
        grouped.append(
            np.abs(
                np.array(mx.dequantize(*mx.quantize(mx.array(block.astype(np.float32))[None], 64, 4), 64, 4))[
                    0
                ]
                - block
            )
        )
        assert grouped[-1].max() <= step * 1.01
    found = packing_error(tmp_path)
    total = np.sqrt((blocks**2).sum())
    assert found.nf4 == pytest.approx(np.sqrt(((np.array(expected) - blocks) ** 2).sum()) / total, rel=1e-4)
    assert found.groups == pytest.approx(np.sqrt((np.array(grouped) ** 2).sum()) / total, rel=1e-4)
    assert str(tmp_path) in found.where


def test_what_a_file_says_stays_in_its_line(tmp_path: Path) -> None:
    """Of names with line breaks, of paths and numbers that no recipe can have."""
    long = "m" * 5000
    text = {
        "a\nrun:": {"r": 4},
        "base_model": long,
        "learning_rate": 1e400,
        "warmup_ratio": "x",
        "lora_alpha": [1],
    }
    told = imported(tmp_path, json.dumps(text).replace("Infinity", ".inf"))
    verdicts = {one["key"].rpartition(".")[2]: one["verdict"] for one in told["lines"]}
    assert verdicts.pop("r") == "mapped"
    assert {verdicts[key] for key in ("base_model", "learning_rate", "warmup_ratio", "lora_alpha")} == {
        "not possible"
    }
    assert load_recipe(tmp_path / "ours.yaml").tuning.rank == 4
