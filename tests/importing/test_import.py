"""`mlx-empire import`: each line of another trainer's configuration has a verdict, and the recipe says what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlx.utils import tree_flatten
from mlx_lm.lora import CONFIG_DEFAULTS
from support.rows import MODEL
from support.tiny_models import tiny_config

from mlx_empire.cli import main as cli
from mlx_empire.model.build import build_model
from mlx_empire.model.target import make_target
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


def test_the_recipe_and_what_became_of_each_line_are_two_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        imported(tmp_path, NESTED, "--json", str(tmp_path / "ours.yaml"))
    assert ended.value.code == 64
    assert f"--json: {tmp_path}/ours.yaml: is what --out writes" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.yaml"]


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


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("layers", ["num_layers: -1\n", "num_layers: 2\n", ""])
def test_what_mlx_lm_trains_in_full_is_what_trains_here(family: str, layers: str, tmp_path: Path) -> None:
    """Its own lines for it: layers alone, the last 16 where the file does not say how many."""
    told = imported(tmp_path, f"fine_tune_type: full\n{layers}")["lines"]
    assert {one["verdict"] for one in told} == {"mapped"}
    config = tiny_config(family)
    name = "n_layer" if family == "gpt2" else "num_hidden_layers"
    config[name] = 18
    tuning = load_recipe(tmp_path / "ours.yaml").tuning
    found = make_target(config, tuning, family, "float32").spec
    theirs = build_model(config, family)
    theirs.freeze()
    wanted = yaml.safe_load(layers)["num_layers"] if layers else CONFIG_DEFAULTS["num_layers"]
    for layer in theirs.layers[-max(wanted, 0) :]:
        layer.unfreeze()
    trained = {name for name, _ in tree_flatten(theirs.trainable_parameters())}
    assert {t.name for unit in found.units for t in unit.tensors if t.trainable} == trained
    assert trained


def test_how_many_layers_get_adapters_is_said_where_mlx_lm_does_not_say_it(tmp_path: Path) -> None:
    (line,) = imported(tmp_path, "fine_tune_type: dora\n")["lines"]
    assert line["keys"] == {"tuning.type": "dora", "tuning.layers": 16}
    assert line["why"] == "the last 16 layers are trained there where num_layers is not said"
