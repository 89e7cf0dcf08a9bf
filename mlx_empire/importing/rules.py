"""What each key of PEFT's, TRL's and transformers' configurations means here.

A key is known by its own name, whatever it is nested in. Its verdict: *mapped*, where a key of the recipe says the same
or training here is always so; *replaced*, where something near takes its place; *not possible*, where nothing does.
Names that mean a key of the recipe and have its values are those of `recipe.foreign`; the others have a rule each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_empire.recipe.foreign import KEYS

MAPPED, REPLACED, NOT_POSSIBLE = "mapped", "replaced", "not possible"


@dataclass(frozen=True)
class Meaning:
    """A verdict, the recipe's keys with their values, and a sentence where those do not say it all."""

    verdict: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""


Rule = Callable[[Any, Mapping[str, Any]], Meaning]  # of a value and of all values by name

ALWAYS = Meaning(MAPPED, {}, "always so")
TYPES = {"lora": "lora", "qlora": "qlora", "dora": "dora", "full": "full"}
SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine": "cosine",
    "linear": "linear",
}
EIGHT_BITS = ("paged_adamw_8bit", "adamw_8bit", "adamw_bnb_8bit")
ADAMW = ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "paged_adamw", "paged_adamw_32bit")


def meaning_of(name: str, value: Any, told: Mapping[str, Any]) -> Meaning:
    """What a key says here; `told`: all values of the file by name."""
    if rule := RULES.get(name):
        return rule(value, told)
    key = KEYS.get(name.replace("_", "-"))
    if key is None:
        return Meaning(NOT_POSSIBLE, {}, "no key of a recipe says this")
    return Meaning(MAPPED, {key: value})


def _one_of(names: Mapping[str, Any], key: str) -> Rule:
    def rule(value: Any, _: Mapping[str, Any]) -> Meaning:
        found = names.get(str(value).lower())
        if found is None:
            return Meaning(NOT_POSSIBLE, {}, f"{key} is one of {', '.join(dict.fromkeys(names.values()))}")
        return Meaning(MAPPED, {key: found})

    return rule


def _always(expected: Any, otherwise: str) -> Rule:
    """A key that decides nothing here as long as it has one of the `expected` values."""
    allowed = expected if isinstance(expected, tuple) else (expected,)
    return lambda value, _: ALWAYS if value in allowed else Meaning(NOT_POSSIBLE, {}, otherwise)


def _dtype(value: Any, _: Mapping[str, Any]) -> Meaning:
    if value in ("bfloat16", "float32", "bf16", "fp32"):
        return Meaning(MAPPED, {"model.dtype": {"bf16": "bfloat16", "fp32": "float32"}.get(value, value)})
    if value in ("auto", "no", None):
        return Meaning(MAPPED, {}, "as stored in the folder, where model.dtype is not set")
    return Meaning(REPLACED, {"model.dtype": "bfloat16"}, "bfloat16 needs no scaling of losses")


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
    if value == "all-linear" or (isinstance(value, list) and value):
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


GROUPS = "by MLX's groups of 64 weights with 4-bit codes, a scale and a bias in bfloat16"
RULES: dict[str, Rule] = {
    "method": _one_of(TYPES, "tuning.type"),
    "peft_type": _one_of(TYPES, "tuning.type"),
    "finetuning_type": _one_of(TYPES, "tuning.type"),
    "use_peft": lambda value, _: Meaning(MAPPED, {"tuning.type": "lora"} if value else {}),
    "use_dora": lambda value, _: Meaning(MAPPED, {"tuning.type": "dora"} if value else {}),
    "use_rslora": lambda value, _: Meaning(MAPPED, {"tuning.rslora": True} if value else {}),
    "r": lambda value, _: Meaning(MAPPED, {"tuning.rank": value}),
    "alpha": lambda value, _: Meaning(MAPPED, {"tuning.alpha": value}),
    "dropout": lambda value, _: Meaning(MAPPED, {"tuning.dropout": value}),
    "bias": _always("none", "no bias is trained beside adapters"),
    "task_type": _always(("CAUSAL_LM", None), "only causal language models are trained"),
    "target_modules": _targets,
    "lora_target_modules": _targets,
    "modules_to_save": _always(
        (None, []), "only adapters are trained; tuning.targets may name embed_tokens and lm_head"
    ),
    "inference_mode": _always((True, False), "true or false there"),
    "fan_in_fan_out": _always(False, "weights are stored outputs first"),
    "init_lora_weights": _always((True, "default"), "lora_b begins at zero and lora_a at random"),
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
    "max_steps": lambda value, _: Meaning(MAPPED, {"run.steps": value} if value > 0 else {}),
    "lr_scheduler_type": _one_of(SCHEDULES, "schedule.type"),
    "warmup_ratio": lambda value, _: Meaning(MAPPED, {"schedule.warmup": f"{100 * value:g}%"}),
    "gradient_accumulation_steps": _accumulated,
    "use_reentrant": lambda _, __: Meaning(
        REPLACED,
        {},
        "by memory.gradient_checkpointing: a step's schedule computes layers again, in one way only",
    ),
    "optim": _optimizer,
    "adam_beta1": _beta,
    "adam_beta2": _beta,
    "base_model_id": _base,
    "base_model_name_or_path": _base,
    "model_name_or_path": _base,
    "model_id": _base,
    "base_model": _base,
    "device_map": lambda _, __: Meaning(REPLACED, {}, "by the hostfile and the plan (`mlx-empire capacity`)"),
    "trust_remote_code": _code,
    "dataset_name": lambda _, __: Meaning(REPLACED, {}, "by --data"),
    "dataset": lambda _, __: Meaning(REPLACED, {}, "by --data"),
}
