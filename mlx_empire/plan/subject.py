"""What is to be trained, as numbers: from a recipe to a described model, with its parameter counts.

Decides where the description comes from (the folder, or the catalog where the folder is not there), what tuning
adds to it and freezes in it, and the one sentence that says why the trainer here cannot train it. No weights are
needed and none are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_empire.errors import UserError
from mlx_empire.plan import catalog
from mlx_empire.plan.config import read_config
from mlx_empire.plan.counts import active_parameters, counted, has_closed_form
from mlx_empire.plan.describe import build_model, compute_dtype, describe
from mlx_empire.plan.model import ModelSpec
from mlx_empire.plan.packing import Choice, as_stored
from mlx_empire.plan.tuning import tuned
from mlx_empire.recipe.schema import Recipe


@dataclass(frozen=True)
class Subject:
    """A model and the way it is tuned. Counts are exact and those of the model itself, without adapters.

    `spec`: after tuning (adapters added, base frozen or quantised). `active_parameters`: those that one token
    passes through (mixtures of experts). `not_trainable`: one sentence why the trainer here cannot do it, or None.
    """

    spec: ModelSpec
    base_parameters: int
    active_parameters: int
    not_trainable: str | None


def subject_of(recipe: Recipe) -> Subject:
    """The subject of a recipe: `model.path` is a folder or a catalog name; else `model.architecture`. UserError."""
    path, architecture = recipe.model.path, recipe.model.architecture
    if path.exists():
        return _subject(read_config(path), str(path), recipe)
    if str(path) in catalog.names():
        return catalog_subject(str(path), recipe)
    if architecture is not None:
        return catalog_subject(architecture, recipe)
    raise UserError(
        f"model.path: {path}: neither a folder nor a catalog name; name its kind in model.architecture, "
        f"such as {catalog.nearest(path.name)}"
    )


def catalog_subject(name: str, recipe: Recipe) -> Subject:
    """The subject that `recipe` would have with the catalog model `name` in the place of its own. UserError."""
    config, _ = catalog.load(name)
    return _subject(config, name, recipe)


def _subject(config: Mapping[str, Any], name: str, recipe: Recipe) -> Subject:
    dtype = compute_dtype(config, recipe.model.dtype)
    tuning = recipe.tuning
    why: str | None = None
    stored: Choice | None = None
    quantization = config.get("quantization")
    if (
        isinstance(quantization, Mapping) and tuning.type != "full"
    ):  # adapters train on what is packed already
        if tuning.type == "dora":
            why = "DoRA on a base that is stored quantised is not built yet"
        config = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}
        stored = as_stored(quantization)
    if has_closed_form(config):
        spec: ModelSpec = counted(config, name, dtype)
        why = f"mlx-lm has no {config['model_type']}, so this model can be counted but not trained here"
    else:
        spec = describe(build_model(config, name), config, name, dtype)
    return Subject(
        tuned(spec, tuning, stored),
        spec.parameters,
        active_parameters(spec),
        why,
    )
