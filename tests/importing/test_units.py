"""Names of other trainers that have another unit or sense than the key they hint at."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_empire.importing.rules import RULES, SAME, meaning_of
from mlx_empire.recipe.foreign import KEYS

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
