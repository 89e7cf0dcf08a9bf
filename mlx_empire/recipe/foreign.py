"""Which key of a recipe says what an option of mlx-lm's trainer, or a common one of transformers', says there."""

from __future__ import annotations

from mlx_empire.recipe.explain import leaf_fields

# By key, the options that mean it or the nearest to it, without their dashes; `_` and `-` are the same.
_OPTIONS = {
    "model.path": "model model-name-or-path pretrained-model-name-or-path base-model",
    "model.dtype": "bf16 fp16 dtype torch-dtype",
    "tuning.type": "fine-tune-type finetune-type finetuning-type use-peft lora use-dora load-in-4bit load-in-8bit",
    "tuning.rank": "lora-r lora-rank rank",
    "tuning.alpha": "lora-alpha lora-scale",
    "tuning.dropout": "lora-dropout",
    "tuning.targets": "lora-target lora-target-modules target-modules lora-keys",
    "tuning.layers": "num-layers lora-layers",
    "tuning.rslora": "use-rslora",
    "tuning.qat": "qat quantization-aware-training",
    "data.path": "data dataset dataset-name train-file dataset-dir",
    "data.sequence_length": "max-seq-length max-length cutoff-len model-max-length block-size sequence-len",
    "data.packing": "packing sample-packing",
    "data.mask_prompt": "mask-prompt completion-only-loss train-on-prompt train-on-inputs",
    "data.validation_split": "val-size val-set-size test-size",
    "batch.global_size": "batch-size train-batch-size",
    "batch.micro_size": "per-device-train-batch-size micro-batch-size",
    "optimizer.name": "optimizer optim",
    "optimizer.learning_rate": "learning-rate lr",
    "optimizer.weight_decay": "weight-decay",
    "optimizer.betas": "adam-beta1 adam-beta2",
    "optimizer.eps": "adam-epsilon",
    "optimizer.clip_norm": "max-grad-norm gradient-clipping",
    "schedule.type": "lr-scheduler-type lr-schedule lr-scheduler",
    "schedule.warmup": "warmup-ratio warmup-steps warmup",
    "memory.gradient_checkpointing": "gradient-checkpointing grad-checkpoint activation-checkpointing",
    "memory.zero_stage": "deepspeed fsdp zero-stage",
    "run.dir": "output-dir adapter-path save-path run-name",
    "run.steps": "iters max-steps num-train-epochs epochs num-epochs",
    "run.seed": "seed data-seed",
    "run.eval_every": "steps-per-eval eval-steps eval-strategy evaluation-strategy",
    "run.eval_batches": "val-batches test-batches",
    "run.save_every": "save-every save-steps save-strategy",
    "run.keep_last": "save-total-limit",
    "run.resume": "resume resume-from-checkpoint resume-adapter-file",
    "report.log_every": "steps-per-report logging-steps",
    "report.tensorboard": "report-to logging-dir",
}
# What no single key says.
_OTHERWISE = {
    "train": "`mlx-empire train` always trains",
    "do-train": "`mlx-empire train` always trains",
    "test": "held-out rows are measured by run.eval_every",
    "do-eval": "held-out rows are measured by run.eval_every",
    "config": "the recipe stands alone, without an option before it",
    "grad-accumulation-steps": "batch.global_size says how many rows a step learns from, batch.micro_size how many "
    "are in memory at a time: what accumulates follows",
    "trust-remote-code": "no code of a model's folder is run, ever",
    "clear-cache-threshold": "freed memory is kept for reuse only within the peak, without a setting",
    "project-name": "figures go to metrics.jsonl in run.dir, and to TensorBoard with report.tensorboard=true",
    "num-processes": "`mlx-empire launch RECIPE --hosts FILE` starts as many as the hostfile says",
}
_OTHERWISE["gradient-accumulation-steps"] = _OTHERWISE["grad-accumulation-steps"]
KEYS = {name: key for key, names in _OPTIONS.items() for name in names.split()}


def answer_to(word: str) -> str | None:
    """What to write in place of another trainer's option such as `--learning-rate=1e-4`; None for any other word."""
    option, _, _ = word.partition("=")
    if not option.startswith("--"):
        return None
    name = option[2:].replace("_", "-")
    if name in _OTHERWISE:
        return f"{option}: {_OTHERWISE[name]}"
    if (key := KEYS.get(name)) is None:
        return None
    return f"{option}: here a key of the recipe: write {key}=... ({leaf_fields()[key].description})"
