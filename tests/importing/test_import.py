"""`mlx-empire import`: each line of another trainer's configuration has a verdict, and the recipe says what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import yaml
from support.rows import MODEL

from mlx_empire.cli import main as cli
from mlx_empire.importing.packing_error import dynamic_levels, nf4, nf4_levels, packing_error
from mlx_empire.importing.rules import RULES, SAME, meaning_of
from mlx_empire.recipe.foreign import KEYS
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
REPLACED = {
    "bnb_4bit_use_double_quant",
    "bnb_4bit_quant_type",
    "optim",
    "use_reentrant",
    "device_map",
    "base_model_id",
}
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
    assert "41 lines: 7 heading, 27 mapped, 6 replaced, 1 not possible" in said
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
    ("text", "words", "told", "keys"),
    [
        ("output_dir: out\n", (), ("mapped", ""), {"run.dir": "out"}),
        ("train_file: theirs\n", (), ("replaced", "by --data"), {"data.path": "rows.jsonl"}),
        (
            "base_model: ./theirs\n",
            ("--model", "mine"),
            ("replaced", 'model.path: the command line says "mine"'),
            {"model.path": "mine"},
        ),
        (
            "base_model: owner/Theirs\n",
            ("--model", "mine"),
            ("replaced", 'model.path: the command line says "mine"'),
            {"model.path": "mine", "model.source": None},
        ),
        (
            "load_in_4bit: true\nuse_dora: true\n",
            (),
            ("not possible", 'tuning.type: line 1 says "qlora"'),
            {"tuning.type": "qlora"},
        ),
        (
            "method: full\nload_in_4bit: true\n",
            (),
            ("not possible", 'tuning.type: line 1 says "full"'),
            {"tuning.type": "full", "tuning.bits": None},
        ),
        (
            "method: lora\nmethod2: x\nuse_peft: false\n",
            (),
            ("not possible", 'tuning.type: line 1 says "lora"'),
            {"tuning.type": "lora"},
        ),
        (
            "use_peft: false\nlora_r: 8\n",
            (),
            ("mapped", "tuning.rank says nothing where tuning.type is full"),
            {"tuning.type": "full", "tuning.rank": None},
        ),
        ("use_peft: false\n", (), ("mapped", ""), {"tuning.type": "full"}),
        ("num_train_epochs: 2\n", (), ("mapped", ""), {"tuning.type": "full"}),
        ("lora_r: 8\n", (), ("mapped", ""), {"tuning.type": "lora", "tuning.rank": 8}),
        (
            "optim: sgd\noptim2: 1\noptimizer: paged_adamw_8bit\n",
            (),
            ("not possible", 'optimizer.name: line 1 says "sgd"'),
            {"optimizer.name": "sgd", "optimizer.state_bits": None},
        ),
    ],
)
def test_a_line_is_told_as_mapped_only_where_the_recipe_has_what_it_says(
    text: str, words: tuple[str, ...], told: tuple[str, str], keys: dict[str, Any], tmp_path: Path
) -> None:
    last = imported(tmp_path, text, *words)["lines"][-1]
    assert (last["verdict"], last["why"]) == told
    load_recipe(tmp_path / "ours.yaml")
    found = yaml.safe_load((tmp_path / "ours.yaml").read_text())
    for key, value in (keys | last["keys"]).items():
        section, name = key.split(".")
        assert found[section].get(name) == value, key


# By name, a value and what it means here, of the hints whose unit or sense is another one there.
OTHER_UNITS: dict[str, tuple[Any, dict[str, Any]]] = {
    "train_on_inputs": (False, {"data.mask_prompt": True}),
    "train-on-inputs": (True, {"data.mask_prompt": False}),
    "train_on_prompt": (False, {"data.mask_prompt": True}),
    "completion_only_loss": (None, {}),
    "epochs": (3, {"run.steps": "3ep"}),
    "num_epochs": (3, {"run.steps": "3ep"}),
    "num_train_epochs": (1.5, {"run.steps": "1.5ep"}),
    "max_steps": (-1, {}),
    "lora_scale": (20, {"tuning.alpha": 160}),
    "num_layers": (-1, {}),
    "lora_layers": (16, {"tuning.layers": 16}),
    "lora_target": ("q_proj, v_proj", {"tuning.targets": ["q_proj", "v_proj"]}),
    "lora_target_modules": ("all", {"tuning.targets": "all-linear"}),
    "target_modules": ("all-linear", {"tuning.targets": "all-linear"}),
    "eval_steps": (0.1, {"run.eval_every": "10%"}),
    "save_steps": (0.25, {"run.save_every": "25%"}),
    "logging_steps": (5, {"report.log_every": 5}),
    "warmup_steps": (0.03, {"schedule.warmup": "3%"}),
    "warmup_ratio": (0.03, {"schedule.warmup": "3%"}),
    "eval_strategy": ("no", {}),
    "evaluation_strategy": ("epoch", {"run.eval_every": "1ep"}),
    "save_strategy": ("epoch", {"run.save_every": "1ep"}),
    "val_batches": (-1, {}),
    "max_grad_norm": (0, {"optimizer.clip_norm": None}),
    "gradient_clipping": (0.5, {"optimizer.clip_norm": 0.5}),
    "report_to": (["wandb", "tensorboard"], {"report.tensorboard": True}),
    "run_name": ("first", {"run.dir": "runs/first"}),
    "resume_from_checkpoint": ("out/checkpoint-10", {}),
    "resume": (False, {}),
    "resume_adapter_file": ("a.safetensors", {}),
    "lr_scheduler": ("constant_with_warmup", {"schedule.type": "constant"}),
    "lr_schedule": ("cosine", {"schedule.type": "cosine"}),
    "lora": (True, {"tuning.type": "lora"}),
    "use_peft": (False, {"tuning.type": "full"}),
    "model": ("owner/Name", {"model.path": "models/name", "model.source": "owner/Name@main"}),
    "optimizer": ("paged_adamw_8bit", {"optimizer.name": "adamw", "optimizer.state_bits": 8}),
    "deepspeed": ("zero3.json", {}),
    "fsdp": ("full_shard", {}),
}


@pytest.mark.parametrize("name", OTHER_UNITS)
def test_a_hint_of_another_unit_is_turned_into_that_of_the_key(name: str) -> None:
    value, keys = OTHER_UNITS[name]
    assert meaning_of(name, value, {name: value}).keys == keys


def test_every_hint_has_the_units_of_its_key_or_a_rule() -> None:
    names = {name.replace("-", "_") for name in KEYS}
    assert names - set(RULES) == SAME
    assert not SAME & set(RULES)


def test_mlx_lm_s_numbers_of_micro_batches_are_steps_here(tmp_path: Path) -> None:
    text = "batch_size: 2\ngrad_accumulation_steps: 4\niters: 1000\nsteps_per_eval: 100\n"
    told = imported(tmp_path, f"{text}save_every: 50\nlora_parameters:\n  rank: 4\n  lora_scale: 10\n")
    assert {one["verdict"] for one in told["lines"]} == {"mapped", "heading"}
    found = load_recipe(tmp_path / "ours.yaml")
    assert (found.batch.micro_size, found.batch.global_size, str(found.run.steps)) == (2, 8, "250")
    assert (str(found.run.eval_every), str(found.run.save_every)) == ("25", "12")
    assert (found.tuning.type, found.tuning.rank, found.tuning.alpha) == ("lora", 4, 40)


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
