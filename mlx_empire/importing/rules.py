"""What each key of PEFT's, TRL's and transformers' configurations means here.

A key is known by its own name, whatever it is nested in. Its verdict: *mapped*, where a key of the recipe says the same
or training here is always so; *replaced*, where something near takes its place; *not possible*, where nothing does.
Of the names that `recipe.foreign` knows those in SAME also have the values of the recipe's key; the others, which mean
the nearest to it in another unit or the other way round, have a rule each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_empire.importing.meaning import (
    ALWAYS,
    MAPPED,
    NOT_POSSIBLE,
    REPLACED,
    Meaning,
    Rule,
    all_or,
    always,
    inverted,
    iterations,
    one_of,
    steps,
    strategy,
)
from mlx_empire.model.lora import DEFAULT_RANK
from mlx_empire.recipe.foreign import KEYS

TYPES = {"lora": "lora", "qlora": "qlora", "dora": "dora", "full": "full"}
SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine": "cosine",
    "linear": "linear",
}
EIGHT_BITS = ("paged_adamw_8bit", "adamw_8bit", "adamw_bnb_8bit")
ADAMW = ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "paged_adamw", "paged_adamw_32bit")
LAYERS_THERE = 16  # mlx-lm's default of num_layers
LAYERS_ALONE = r"(.*\.)?(layers|blocks|h)\.[0-9]+\."  # paths of the layers' parameters in mlx-lm's models
# Names whose values are those of the recipe's key, unit by unit.
_SAME = """
lora_r lora_rank rank lora_alpha lora_dropout max_seq_length max_length cutoff_len model_max_length block_size
sequence_len packing sample_packing mask_prompt val_size val_set_size test_size train_batch_size
per_device_train_batch_size micro_batch_size learning_rate lr weight_decay adam_epsilon warmup gradient_checkpointing
grad_checkpoint activation_checkpointing zero_stage output_dir adapter_path save_path seed data_seed save_total_limit
"""
SAME = frozenset(_SAME.split())


def meaning_of(name: str, value: Any, told: Mapping[str, Any]) -> Meaning:
    """What a key says here; `told`: all values of the file by name."""
    name = name.replace("-", "_")
    if rule := RULES.get(name):
        return rule(value, told)
    if name not in SAME:
        return Meaning(NOT_POSSIBLE, {}, "no key of a recipe says this")
    return Meaning(MAPPED, {KEYS[name.replace("_", "-")]: value})


def _dtype(value: Any, _: Mapping[str, Any]) -> Meaning:
    if value in ("bfloat16", "float32", "bf16", "fp32"):
        return Meaning(MAPPED, {"model.dtype": {"bf16": "bfloat16", "fp32": "float32"}.get(value, value)})
    if value in ("auto", "no", None):
        return Meaning(MAPPED, {}, "as stored in the folder, where model.dtype is not set")
    return Meaning(
        REPLACED,
        {"model.dtype": "bfloat16"},
        "bfloat16 needs no scaling of losses; model.dtype: float16 scales them",
    )


def _packed(bits: int) -> Rule:
    def rule(value: Any, _: Mapping[str, Any]) -> Meaning:
        keys = {"tuning.type": "qlora", "tuning.bits": bits} if value is True else {}
        return Meaning(MAPPED, keys, "" if value is True else "not packed, unless another line says so")

    return rule


def _epochs(value: Any, told: Mapping[str, Any]) -> Meaning:
    if int(told.get("max_steps") or -1) > 0:
        return Meaning(MAPPED, {}, "max_steps goes before it, as there")
    return Meaning(MAPPED, {"run.steps": f"{value:g}ep"})


def _accumulated(value: Any, told: Mapping[str, Any]) -> Meaning:
    rows = int(told.get("per_device_train_batch_size") or told.get("micro_batch_size") or 1)
    return Meaning(
        MAPPED, {"batch.global_size": rows * value}, f"{rows} x {value} rows a step, on one device there"
    )


def _micro_batches(value: Any, told: Mapping[str, Any]) -> Meaning:
    rows = int(told.get("batch_size") or 4)  # mlx-lm's own default
    return Meaning(MAPPED, {"batch.global_size": rows * value}, f"{rows} x {value} rows a step")


def _rows(value: Any, told: Mapping[str, Any]) -> Meaning:
    accumulated = int(told.get("grad_accumulation_steps") or 1) > 1
    return Meaning(MAPPED, {"batch.micro_size" if accumulated else "batch.global_size": value})


def _rounded(value: Any, _: Mapping[str, Any]) -> Meaning:
    """Quantisation-aware training elsewhere has integers of four bits and more."""
    if not value:
        return ALWAYS
    return Meaning(
        NOT_POSSIBLE, {}, "weights are trained for being rounded to three values alone (tuning.qat: ternary)"
    )


def _kind_there(value: Any, told: Mapping[str, Any]) -> Meaning:
    """mlx-lm's word, beside which `num_layers` is 16 where nobody says it."""
    found = one_of(TYPES, "tuning.type")(value, told)
    if found.verdict is not MAPPED or {"num_layers", "num-layers"} & told.keys():
        return found
    why = f"the last {LAYERS_THERE} layers are trained there where num_layers is not said"
    return Meaning(MAPPED, {**found.keys, "tuning.layers": LAYERS_THERE}, why)


def _layers_there(value: Any, told: Mapping[str, Any]) -> Meaning:
    """With `fine_tune_type: full` mlx-lm trains layers alone, also where it is all of them."""
    if value != -1 or str(told.get("fine_tune_type", told.get("fine-tune-type"))).lower() != "full":
        return all_or("tuning.layers")(value, told)
    why = "all layers; embedding, last norm and head stay as they are, as there"
    return Meaning(MAPPED, {"tuning.unfrozen_parameters": [LAYERS_ALONE]}, why)


def _scale(value: Any, told: Mapping[str, Any]) -> Meaning:
    """mlx-lm multiplies by it what is divided by the rank here."""
    names = ("lora_r", "lora_rank", "rank", "r")
    rank = next((int(told[name]) for name in names if told.get(name)), DEFAULT_RANK)
    return Meaning(MAPPED, {"tuning.alpha": value * rank}, f"alpha / rank is {value} for a rank of {rank}")


def _named_run(value: Any, told: Mapping[str, Any]) -> Meaning:
    if any(told.get(name) for name in ("output_dir", "adapter_path", "save_path")):
        return Meaning(MAPPED, {}, "a run goes by its folder, which another line names")
    return Meaning(MAPPED, {"run.dir": f"runs/{value}"}, "a run goes by its folder")


def _resumed(value: Any, _: Mapping[str, Any]) -> Meaning:
    if value in (None, True, False, "auto"):
        return Meaning(MAPPED, {}, "a run goes on from its own newest checkpoint, if it has one")
    why = "no checkpoint of another trainer is read; tuning.start begins from an adapter's folder"
    return Meaning(NOT_POSSIBLE, {}, why)


def _reported(value: Any, _: Mapping[str, Any]) -> Meaning:
    to = value if isinstance(value, list) else [value]
    if "tensorboard" in to or "all" in to:
        return Meaning(MAPPED, {"report.tensorboard": True})
    return Meaning(
        MAPPED if set(to) <= {"none", None} else REPLACED, {}, "figures go to metrics.jsonl in run.dir"
    )


def _optimizer(value: Any, _: Mapping[str, Any]) -> Meaning:
    if value in EIGHT_BITS:
        why = "8-bit averages by this package's own codes, in blocks of 64; nothing is paged, for memory is planned"
        return Meaning(REPLACED, {"optimizer.name": "adamw", "optimizer.state_bits": 8}, why)
    if value in ADAMW:
        why = "nothing is paged, for memory is planned" if "paged" in value else ""
        keys = {"optimizer.name": "adamw", "optimizer.state_bits": 32}
        return Meaning(REPLACED if why else MAPPED, keys, why)
    if value in ("sgd", "lion", "lion_32bit"):
        return Meaning(MAPPED, {"optimizer.name": value.partition("_")[0]})
    return Meaning(NOT_POSSIBLE, {}, "optimizer.name is adamw, lion or sgd")


def _beta(_: Any, told: Mapping[str, Any]) -> Meaning:
    return Meaning(MAPPED, {"optimizer.betas": [told.get("adam_beta1", 0.9), told.get("adam_beta2", 0.999)]})


def _targets(value: Any, _: Mapping[str, Any]) -> Meaning:
    if value in ("all", "all-linear"):
        return Meaning(MAPPED, {"tuning.targets": "all-linear"})
    if isinstance(value, str) and "," in value:  # as LLaMA-Factory writes a list
        value = [one.strip() for one in value.split(",")]
    if isinstance(value, list) and value:
        return Meaning(MAPPED, {"tuning.targets": value})
    return Meaning(NOT_POSSIBLE, {}, "tuning.targets is all-linear or a list of names, no pattern")


def _base(value: Any, _: Mapping[str, Any]) -> Meaning:
    here, owner = Path(str(value)), str(value).split("/")
    if here.is_dir() or len(owner) != 2 or str(value).startswith((".", "/", "~")):
        return Meaning(MAPPED, {"model.path": str(value)})
    keys = {"model.path": f"models/{owner[1].lower()}", "model.source": f"{value}@main"}
    return Meaning(MAPPED, keys, "`mlx-empire fetch` brings it")


def _code(value: Any, _: Mapping[str, Any]) -> Meaning:
    why = "no code of a model's folder is run; take the model in transformers' own form (often NAME-hf)"
    return Meaning(NOT_POSSIBLE, {}, why) if value else ALWAYS


def _divided(value: Any, _: Mapping[str, Any]) -> Meaning:
    return Meaning(REPLACED, {}, "by memory.zero_stage, which is auto") if value else ALWAYS


def _by_data(_: Any, __: Mapping[str, Any]) -> Meaning:
    return Meaning(REPLACED, {}, "by --data")


def _unfrozen(value: Any, _: Mapping[str, Any]) -> Meaning:
    """Axolotl's patterns, which also fit a name's beginning; it may add a range of rows, [0:32000]."""
    patterns = [value] if isinstance(value, str) else list(value or ())
    if sliced := next((one for one in patterns if re.search(r"\[\d*:\d*\]$", str(one))), None):
        return Meaning(NOT_POSSIBLE, {}, f"{sliced}: a parameter trains whole or not at all")
    return Meaning(MAPPED, {"tuning.unfrozen_parameters": patterns} if patterns else {})


GROUPS = "by MLX's groups of 64 weights with 4-bit codes, a scale and a bias in bfloat16"
RULES: dict[str, Rule] = {
    "method": one_of(TYPES, "tuning.type"),
    "peft_type": one_of(TYPES, "tuning.type"),
    "finetuning_type": one_of(TYPES, "tuning.type"),
    "fine_tune_type": _kind_there,
    "finetune_type": one_of(TYPES, "tuning.type"),
    "lora": one_of({"true": "lora"}, "tuning.type"),
    "use_peft": lambda value, _: Meaning(MAPPED, {"tuning.type": "lora" if value else "full"}),
    "use_dora": lambda value, _: Meaning(MAPPED, {"tuning.type": "dora"} if value else {}),
    "use_rslora": lambda value, _: Meaning(MAPPED, {"tuning.rslora": True} if value else {}),
    "r": lambda value, _: Meaning(MAPPED, {"tuning.rank": value}),
    "alpha": lambda value, _: Meaning(MAPPED, {"tuning.alpha": value}),
    "lora_scale": _scale,
    "dropout": lambda value, _: Meaning(MAPPED, {"tuning.dropout": value}),
    "bias": always("none", "no bias is trained beside adapters"),
    "task_type": always(("CAUSAL_LM", None), "only causal language models are trained"),
    "target_modules": _targets,
    "lora_target_modules": _targets,
    "lora_target": _targets,
    "lora_keys": _targets,
    "qat": _rounded,
    "quantization_aware_training": _rounded,
    "num_layers": _layers_there,
    "lora_layers": all_or("tuning.layers"),
    "unfrozen_parameters": _unfrozen,
    "modules_to_save": always(
        (None, []), "only adapters are trained; tuning.targets may name embed_tokens and lm_head"
    ),
    "inference_mode": always((True, False), "true or false there"),
    "fan_in_fan_out": always(False, "weights are stored outputs first"),
    "init_lora_weights": always((True, "default"), "lora_b begins at zero and lora_a at random"),
    "load_in_4bit": _packed(4),
    "load_in_8bit": _packed(8),
    "bnb_4bit_compute_dtype": _dtype,
    "bnb_4bit_quant_type": lambda value, _: Meaning(REPLACED, {"tuning.bits": 4}, f"{value}: {GROUPS}"),
    "bnb_4bit_use_double_quant": lambda value, _: Meaning(
        REPLACED, {}, f"constants of {'4.127' if value else '4.5'} bits a weight in all: 4.5 {GROUPS}"
    ),
    "torch_dtype": _dtype,
    "dtype": _dtype,
    "mixed_precision": _dtype,
    "bf16": lambda value, _: Meaning(MAPPED, {"model.dtype": "bfloat16"} if value else {}),
    "fp16": lambda value, told: _dtype("float16", told) if value else ALWAYS,
    "num_train_epochs": _epochs,
    "num_epochs": _epochs,
    "epochs": _epochs,
    "iters": iterations("run.steps"),
    "steps_per_eval": iterations("run.eval_every"),
    "steps_per_report": iterations("report.log_every"),
    "save_every": iterations("run.save_every"),
    "eval_steps": steps("run.eval_every"),
    "save_steps": steps("run.save_every"),
    "logging_steps": steps("report.log_every"),
    "eval_strategy": strategy("run.eval_every"),
    "evaluation_strategy": strategy("run.eval_every"),
    "save_strategy": strategy("run.save_every"),
    "val_batches": all_or("run.eval_batches"),
    "test_batches": lambda _, __: Meaning(NOT_POSSIBLE, {}, "test rows are for `mlx-empire evaluate`"),
    "resume": _resumed,
    "resume_from_checkpoint": _resumed,
    "resume_adapter_file": _resumed,
    "run_name": _named_run,
    "report_to": _reported,
    "logging_dir": lambda _, __: Meaning(REPLACED, {}, "figures go to metrics.jsonl in run.dir"),
    "train_on_inputs": inverted("data.mask_prompt"),
    "train_on_prompt": inverted("data.mask_prompt"),
    "completion_only_loss": lambda value, _: Meaning(
        MAPPED, {} if value is None else {"data.mask_prompt": value}, "as rows are" if value is None else ""
    ),
    "max_steps": lambda value, _: Meaning(MAPPED, {"run.steps": value} if value > 0 else {}),
    "lr_scheduler_type": one_of(SCHEDULES, "schedule.type"),
    "lr_scheduler": one_of(SCHEDULES, "schedule.type"),
    "lr_schedule": one_of(SCHEDULES, "schedule.type"),
    "warmup_steps": steps("schedule.warmup"),
    "warmup_ratio": lambda value, _: Meaning(MAPPED, {"schedule.warmup": f"{100 * value:g}%"}),
    "gradient_accumulation_steps": _accumulated,
    "grad_accumulation_steps": _micro_batches,
    "batch_size": _rows,
    "deepspeed": _divided,
    "fsdp": _divided,
    "use_reentrant": lambda _, __: Meaning(
        REPLACED,
        {},
        "by memory.gradient_checkpointing: a step's schedule computes layers again, in one way only",
    ),
    "optim": _optimizer,
    "optimizer": _optimizer,
    "max_grad_norm": lambda value, _: Meaning(MAPPED, {"optimizer.clip_norm": value or None}),
    "gradient_clipping": lambda value, _: Meaning(MAPPED, {"optimizer.clip_norm": value or None}),
    "adam_beta1": _beta,
    "adam_beta2": _beta,
    "base_model_id": _base,
    "base_model_name_or_path": _base,
    "model_name_or_path": _base,
    "pretrained_model_name_or_path": _base,
    "model_id": _base,
    "model": _base,
    "base_model": _base,
    "device_map": lambda _, __: Meaning(REPLACED, {}, "by the hostfile and the plan (`mlx-empire capacity`)"),
    "trust_remote_code": _code,
} | dict.fromkeys(("dataset_name", "dataset", "dataset_dir", "data", "train_file"), _by_data)
