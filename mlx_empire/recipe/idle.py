"""Which keys of a recipe have no effect with the others: told once at the start and in the capacity report.

What contradicts another key is refused by the schema, what needs data that is not there by `refuse_unmeasured`; what is
merely idle is told. A value that is the default is never
told, for nobody asked for it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from mlx_empire.errors import UserError
from mlx_empire.recipe.evaluation import GENERATED, HELD_OUT_LOSS
from mlx_empire.recipe.explain import leaf_fields
from mlx_empire.recipe.load import written
from mlx_empire.recipe.schema import Recipe

HALF = frozenset(("bfloat16", "float16"))  # dtypes that masters complete
Reason = tuple[str, str]  # a key, and why it has no effect


def without_effect(recipe: Recipe, dtypes: Collection[str], ranks: int) -> list[str]:
    """One line that names every idle key with its value and the reason; none where there is no such key.

    `dtypes`: of the tensors that are trained; `ranks`: how many carry the run.
    """
    defaults = leaf_fields()
    told = []
    for key, why in (*_of_one_rank(recipe, ranks), *_of_optimizer(recipe, dtypes), *_of_the_rest(recipe)):
        section, name = key.split(".")
        found = getattr(getattr(recipe, section), name)
        if found != defaults[key].default:
            told.append(f"{key}: {written(found)} ({why})")
    told += _of_sets(recipe)
    return [f"without effect here: {'; '.join(told)}"] if told else []


def _of_sets(recipe: Recipe) -> Iterator[str]:
    for one in recipe.evaluation.sets:
        idle = (
            (
                one.pattern is not None and "regular_expression" not in one.metrics,
                "pattern",
                "regular_expression",
            ),
            (one.json_schema is not None and "json_schema" not in one.metrics, "schema", "json_schema"),
            (
                one.max_tokens != type(one).model_fields["max_tokens"].default and not one.generates,
                "max_tokens",
                ", ".join(GENERATED),
            ),
        )
        for is_idle, name, metric in idle:
            if is_idle:
                yield f"evaluation.sets: {name} of {one.title} (it serves {metric})"


def _of_one_rank(recipe: Recipe, ranks: int) -> Iterator[Reason]:
    if ranks > 1:
        return
    # cells are not among them: they fix how gradients are added, also for those who go on with more machines.
    for key in ("memory.zero_stage", "memory.shares", "comm.route", "comm.bucket_bytes"):
        yield key, "one machine divides and sends nothing"
    if recipe.run.buddy is True:
        yield "run.buddy", "there is no other machine to keep a copy"


def _of_optimizer(recipe: Recipe, dtypes: Collection[str]) -> Iterator[Reason]:
    optimizer = recipe.optimizer
    if not HALF & set(dtypes) and optimizer.master_weights != "none":
        yield "optimizer.master_weights", "float32 weights are their own masters"
    if optimizer.name != "adamw":
        yield "optimizer.eps", f"{optimizer.name} divides by no average"
    if optimizer.name == "sgd" and optimizer.betas[1] != leaf_fields()["optimizer.betas"].default[1]:
        yield "optimizer.betas", "sgd reads the first one only"


def _of_the_rest(recipe: Recipe) -> Iterator[Reason]:
    numerics, run = recipe.numerics, recipe.run
    if recipe.distillation.teacher is None:
        for key in ("weight", "temperature", "top"):
            yield f"distillation.{key}", "there is no distillation.teacher"
    if not recipe.dynamic_loss_scale:
        yield "numerics.loss_scale_window", "no loss scale is dynamic"
    if recipe.memory.gradient_checkpointing != "auto":
        yield "memory.keep_products", "memory.gradient_checkpointing is not auto"
    if recipe.memory.gradient_checkpointing is False:
        yield "memory.activation_offload", "memory.gradient_checkpointing is false, so no layer is recomputed"
    elif recipe.memory.activation_offload is True:
        yield "memory.run_ahead", "memory.activation_offload waits at each layer"
    if recipe.data.format in ("text", "tokens"):
        yield "data.mask_prompt", f"rows of {recipe.data.format} have no prompt"
    if numerics.spikes == "off":
        yield "numerics.threshold", "numerics.spikes is off"
        yield "numerics.window", "numerics.spikes is off"
    if numerics.spikes in ("off", "log"):
        yield "numerics.max_skips", f"numerics.spikes is {numerics.spikes}, so no step is skipped"
    elif numerics.max_skips >= numerics.window:
        yield "numerics.max_skips", "all steps of numerics.window may be skipped"
    if run.eval_every is None:
        yield "run.eval_batches", "run.eval_every is null, so nothing is evaluated"
        yield "report.samples", "run.eval_every is null, so no held-out row is read"
        if recipe.data.validation_split:
            yield "data.validation_split", "run.eval_every is null: rows are held out and never measured on"
    if recipe.report.progress == "always":
        yield "report.log_every", "report.progress is always, so no lines are written"
    if recipe.comm.deadline_floor_seconds > recipe.comm.deadline_seconds:
        yield "comm.deadline_floor_seconds", "no deadline is longer than comm.deadline_seconds"
    if recipe.model.init == "random":
        yield "model.compare", "model.init is random, so no weights are read"


def refuse_unmeasured(recipe: Recipe, held_out: bool) -> None:
    """UserError for an evaluation that was asked for and could never happen, where no rows are `held_out`."""
    if held_out:
        return
    gate = recipe.evaluation.stop_when
    if gate is not None and any(one.metric == HELD_OUT_LOSS for one in gate.parts):
        raise UserError(
            f"evaluation.stop_when: {HELD_OUT_LOSS}: there is no validation data to measure it on"
        )
    if recipe.run.eval_every is not None and not recipe.evaluation.sets:
        raise UserError(
            f"run.eval_every: {recipe.run.eval_every}: there is no validation data; add a valid.jsonl to data.path "
            "or set data.validation_split"
        )
    if recipe.report.samples and recipe.run.eval_every is not None:
        raise UserError(
            f"report.samples: {recipe.report.samples}: there is no validation data to read; add a valid.jsonl to "
            "data.path or set data.validation_split"
        )
