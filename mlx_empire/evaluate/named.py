"""What is evaluated, as a recipe: whatever a person names becomes the recipe of a run that would only evaluate it.

So a finished model, a foreign one, an adapter and its base are read, planned and streamed as in training. Decided here
is which weights a name means, which sets are asked, and that no code is run which only the run's recipe names. An
adapter goes on its base by `tuning.start`; the base of one that was trained on packed weights is packed alike, with
adapters that add nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_empire.data.files import locate
from mlx_empire.errors import UserError
from mlx_empire.evaluate.command import BASE
from mlx_empire.formats.adapter_folder import PEFT_WEIGHTS, WEIGHTS_NAME, read_mlx_lm, read_settings
from mlx_empire.recipe.changes import parse_stored, variant
from mlx_empire.recipe.duration import Duration
from mlx_empire.recipe.evaluation import CITATIONS, GROUNDED, TASKS
from mlx_empire.recipe.load import MAX_BYTES, dump_recipe, parse_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.recipe.sections import TuningSection
from mlx_empire.recipe.text import read_small_text
from mlx_empire.run.finished import Finished, finished
from mlx_empire.run.names import RECIPE
from mlx_empire.run.resident import base_folder_of

ROWS = 8  # pass a rank at once
FOREIGN_LENGTH = 1024  # positions of a row, for what comes without a recipe
NO_TUNING = {f"tuning.{name}": field.default for name, field in TuningSection.model_fields.items()}
# What a run has besides its weights, and an evaluation has not.
IDLE: dict[str, Any] = {
    "model.init": "pretrained",
    "model.architecture": None,
    "model.source": None,
    "batch.micro_size": 1,
    "batch.cells": "auto",
    "optimizer.in_backward": False,
    "optimizer.statistics_every": None,
    "memory.gradient_checkpointing": True,
    "memory.keep_products": False,
    "memory.activation_offload": False,
    "memory.shares": "memory",
    "numerics.spikes": "off",
    "evaluation.stop_when": None,
    "evaluation.fallback": None,
    "run.save_every": None,
    "run.eval_every": Duration(1),
    "run.resume": "auto",
    "run.accept_changes": (),
    "report.samples": 0,
}


def recipes_of(options: argparse.Namespace, ranks: int) -> list[Recipe]:
    """Recipes of what is evaluated, after what it is compared with. UserError."""
    found = finished(options.named, "RUN")
    asked = [] if options.against is None else [_against(found, options)]
    asked.append(_result(found, options.model, "RUN"))
    sets = [*map(_set, options.sets), *_tasks(options.tasks, options.tasks_from)]
    own = asked[-1].evaluation
    made = []
    for recipe in asked:
        whole = variant(recipe, {**IDLE, "batch.global_size": ROWS * ranks, "evaluation.sets": own.sets})
        words = [f"evaluation.sets={json.dumps(sets)}"] if sets else []
        made.append(parse_recipe(dump_recipe(whole), str(options.named), [*words, *options.overrides]))
    if not made[-1].evaluation.sets:
        raise UserError(
            f"RUN: {options.named}: its recipe asks no questions; name some by --sets FILE or --tasks NAME,..."
        )
    if not (
        sets or options.scorers or any(word.startswith("evaluation.sets=") for word in options.overrides)
    ):
        _refuse_code(made[-1], options.named)
    return made


def _refuse_code(recipe: Recipe, named: Path) -> None:
    """UserError where a run's own recipe names code: it comes with the run, maybe from somebody else."""
    code = [one.scorer for one in recipe.evaluation.sets if one.scorer is not None]
    if code:
        raise UserError(
            f"RUN: {named}: its recipe names code, {', '.join(code)}; look at it, then add --scorers to run it"
        )


def _against(found: Finished, options: argparse.Namespace) -> Recipe:
    if options.against != BASE:
        return _result(finished(Path(options.against), "--against"), options.model, "--against")
    if not found.adapter:
        if found.run is None:
            raise UserError(
                f"--against: base: {options.named}: nothing says what it was trained from; name that"
            )
        recipe = _stored(found.run)
        if recipe.model.init == "random":
            raise UserError(f"--against: base: {options.named}: it began at random; name a run or a model")
        return recipe
    recipe = _adapter(found, options.model, "--against")
    fresh = {"tuning.start": None} if recipe.tuning.type == "qlora" else NO_TUNING
    return variant(recipe, fresh)


def _result(found: Finished, base: Path | None, key: str) -> Recipe:
    """The recipe that reads a result's weights: a whole model's, or an adapter's over its base."""
    if found.adapter:
        return _adapter(found, base, key)
    if not (found.weights / "config.json").exists():
        raise UserError(f"{key}: {found.weights}: no model is there (config.json is missing)")
    recipe = _foreign(found.weights) if found.run is None else _stored(found.run)
    return variant(recipe, {"model.path": found.weights, "model.base_digest": None})


def _adapter(found: Finished, base: Path | None, key: str) -> Recipe:
    folder = base_folder_of(found, base, key)
    recipe = _foreign(folder) if found.run is None else _stored(found.run)
    packed = (
        {"tuning.type": "qlora", "tuning.bits": recipe.tuning.bits} if recipe.tuning.type == "qlora" else {}
    )
    shape = {f"tuning.{name}": value for name, value in _shape(found.weights).items()}
    return variant(
        recipe, {**NO_TUNING, **shape, **packed, "model.path": folder, "tuning.start": found.weights}
    )


def _stored(run: Path) -> Recipe:
    path = run / RECIPE
    return parse_stored(read_small_text(path, "recipe", MAX_BYTES, ""), str(path))


def _foreign(model: Path) -> Recipe:
    """What is asked of a model that no recipe comes with."""
    told = {
        "model": {"path": str(model)},
        "data": {"path": "none", "sequence_length": FOREIGN_LENGTH},
        "batch": {"global_size": 1},
        "optimizer": {"learning_rate": 1.0},
        "run": {"dir": "none", "steps": 1},
    }
    return parse_recipe(json.dumps(told), str(model))


def _shape(weights: Path) -> dict[str, Any]:
    """The keys of `tuning` by which an adapter's layers are made anew. UserError."""
    if (weights / WEIGHTS_NAME).exists():
        settings = read_mlx_lm(weights).settings
        kind, alpha = "dora" if settings.dora else "lora", settings.scale * settings.rank
        targets, layers = settings.keys, settings.layers
        return {"type": kind, "rank": settings.rank, "alpha": alpha, "targets": targets, "layers": layers}
    if (weights / PEFT_WEIGHTS).exists():
        return _of_peft(read_settings(weights), weights)
    raise UserError(f"{weights}: neither {WEIGHTS_NAME} nor {PEFT_WEIGHTS} is there")


def _of_peft(config: Mapping[str, Any], weights: Path) -> dict[str, Any]:
    names = config.get("target_modules")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{weights}: its target_modules are no list of names; mlx-empire export mlx-lm makes mlx-lm's form of it"
        )
    return {
        "type": "dora" if config.get("use_dora") else "lora",
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "targets": tuple(sorted({name.rpartition(".")[2] for name in names})),
        "rslora": True if config.get("use_rslora") else None,
    }


def _set(word: str) -> dict[str, Any]:
    """A set as `--sets` names it: its file, and the metrics or what its first row has answers for. UserError."""
    path, _, metrics = word.partition("=")
    return {"path": path, "metrics": metrics.split(",") if metrics else _measured(Path(path))}


def _measured(path: Path) -> list[str]:
    source, _ = locate(path)
    row = next((row.value for row in source.rows()), {})
    if "supports" in row:
        unanswerable = any(row.value.get("supports") == [] for row in source.rows())
        return list(GROUNDED if unanswerable else CITATIONS)
    if "choices" in row:
        return ["multiple_choice"]
    if "schema" in row:
        return ["valid_json", "json_schema"]
    return ["regular_expression"] if "pattern" in row else ["loss", "token_accuracy", "exact_match"]


def _tasks(names: Sequence[str], folder: Path | None) -> list[dict[str, Any]]:
    for name in names:
        if name not in TASKS:
            raise UserError(f"--tasks: {name}: not known; there are {', '.join(TASKS)}")
    return [
        {"path": str(folder / f"{name}.jsonl"), "name": name, "task": name, "metrics": ["multiple_choice"]}
        for name in names
        if folder is not None
    ]
