"""The model to be trained, described before a byte of its weights is read: the one answer of all commands.

Decides where a model's configuration comes from where its folder may be absent (the folder, else the catalog), what
tuning does to mlx-lm's lazy module (the base frozen and perhaps packed, adapters put in), and the one sentence that
says why the trainer here cannot train it. Arrays are never evaluated, so a description takes a second and no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_empire.errors import UserError
from mlx_empire.model.build import Stored, build_model, compute_dtype, describe, refuse_dropped_head, settle
from mlx_empire.model.closed_forms import active_parameters
from mlx_empire.model.config import read_config
from mlx_empire.model.lora import AdapterSettings, adapt, put_in
from mlx_empire.model.packing_config import refuse_foreign_packing
from mlx_empire.model.parts import freeze_other_parts
from mlx_empire.model.quantize import (
    Choice,
    as_stored,
    quant_format_of,
    quantize_as_stored,
    quantize_modules,
    refuse_other_packing,
    refuse_unread,
    stored_quantization,
    uniformly,
    unpacked,
)
from mlx_empire.model.spec import ModelSpec
from mlx_empire.model.ternary import GROUP, put_ternary
from mlx_empire.model.unread import refuse_row_length
from mlx_empire.recipe.schema import Recipe
from mlx_empire.recipe.sections import TuningSection
from mlx_empire.recipe.source import how_to_fetch


@dataclass(frozen=True)
class Target:
    """A model and the way it is tuned; `model` is mlx-lm's module, lazily, with its adapters.

    `spec`: what is trained; `base`: what is read from the model's folder (the same for plain full tuning). `rebuild`
    makes mlx-lm's own module anew, lazily and without adapters. `adapters`: None for full tuning. `packing`: how
    matrices of the base are packed while they are loaded, if they are. `ternary`: weights are trained as ternary ones,
    and `base` is what a result holds of them. `not_trainable`: one sentence why the trainer here cannot do it, or None;
    only targets that are planned have one, the others are refused.
    """

    model: nn.Module
    spec: ModelSpec
    base: ModelSpec
    rebuild: Callable[[], nn.Module]
    adapters: AdapterSettings | None = None
    packing: Choice | None = None
    ternary: bool = False
    not_trainable: str | None = None

    @property
    def base_parameters(self) -> int:
        """Parameters of the model itself, without adapters, however they are stored."""
        return self.spec.base_parameters

    @property
    def active_parameters(self) -> int:
        """Those of them that one token passes through (mixtures of experts)."""
        return active_parameters(self.spec)


def make_target(
    config: Mapping[str, Any], tuning: TuningSection, name: str, dtype: str, stored: Stored | None = None
) -> Target:
    """The model of `config` with the adapters that `tuning` asks for; `stored` describes its folder, if it has one.

    UserError for what cannot be trained here.
    """
    refuse_foreign_packing(config, name)
    refuse_other_packing(config, tuning, name)
    return _tuned(config, tuning, name, dtype, stored)


def planned_target(recipe: Recipe, tensors: Callable[[Path], Stored | None] = lambda _: None) -> Target:
    """What a plan is made for: `model.path` is a folder or a catalog name; else `model.architecture`. UserError.

    No weights are needed. `tensors`: describes those of a folder, if it has any; the model is settled for them as the
    run's is (heads, packed layers, names that nothing reads).
    """
    path, architecture = recipe.model.path, recipe.model.architecture
    if path.exists():
        config = read_config(path)
        refuse_other_architecture(config, recipe)
        return _planned(
            config, str(path), recipe, tensors(path) if recipe.model.init == "pretrained" else None
        )
    # A run has a folder; only plans ask the catalog.
    from mlx_empire.model import catalog

    if str(path) in catalog.names():
        return catalog_target(str(path), recipe)
    if architecture is not None:
        return catalog_target(architecture, recipe)
    raise UserError(
        f"model.path: {path}: neither a folder nor a catalog name; name its kind in model.architecture, "
        f"such as {catalog.nearest(path.name)}; {how_to_fetch(recipe)}"
    )


def catalog_target(name: str, recipe: Recipe) -> Target:
    """The target that `recipe` would have with the catalog model `name` in the place of its own. UserError."""
    from mlx_empire.model import catalog

    config, _ = catalog.load(name)
    return _planned(config, name, recipe)


def shaped_target(config: Mapping[str, Any], name: str, recipe: Recipe) -> Target:
    """The target that `recipe` would have with a model of this configuration, which need not exist. UserError."""
    return _planned(config, name, recipe)


def with_adapter(plain: Target, settings: AdapterSettings) -> ModelSpec:
    """The plain model with the adapters that `settings` describe, wherever they come from."""
    model = plain.rebuild()
    model.freeze()
    try:
        put_in(model, settings)
    except (KeyError, ValueError) as error:
        raise UserError(f"{plain.spec.name}: mlx-lm cannot put such an adapter into it: {error}") from None
    return describe(model, plain.spec.config, plain.spec.name, plain.spec.dtype)


def refuse_other_architecture(config: Mapping[str, Any], recipe: Recipe) -> None:
    """UserError where model.architecture names another kind of model than `config`, that of the folder, is."""
    name = recipe.model.architecture
    if name is None:
        return
    from mlx_empire.model import catalog

    def kind(one: Mapping[str, Any]) -> tuple[str, Any, Any]:
        text = one.get("text_config") or one
        model_type = str(one.get("model_type")).removesuffix("_text")
        return model_type, text.get("hidden_size"), text.get("num_hidden_layers")

    ours, theirs = kind(config), kind(catalog.load(name)[0])
    if any(a != b for a, b in zip(ours, theirs, strict=True) if None not in (a, b)):  # families have defaults
        each = ["{} of width {} with {} layers".format(*one) for one in (theirs, ours)]
        raise UserError(
            f"model.architecture: {name}: is {each[0]}, and {recipe.model.path} is {each[1]}; leave "
            "model.architecture out, or name another model.path"
        )


def refuse_impossible(spec: ModelSpec) -> None:
    """UserError for what MLX cannot multiply on a CPU: stacked experts in half precision, NVFP4 with global scales."""
    plain = (t for u in spec.units for t in u.tensors if t.name.endswith(".weight"))
    stacked = sorted({t.dtype for t in plain if len(t.shape) == 3} & {"bfloat16", "float16"})
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    if on_cpu and any(t.name.endswith(".global_scale") for u in spec.units for t in u.tensors):
        raise UserError(f"{spec.name}: MLX on a CPU has no NVFP4 with global scales; train on a GPU")
    if stacked and on_cpu:
        raise UserError(
            f"model.dtype: {stacked[0]}: MLX on a CPU multiplies the experts of {spec.family} in float32 only; "
            "set model.dtype: float32, or train on a GPU"
        )


def _planned(config: Mapping[str, Any], name: str, recipe: Recipe, stored: Stored | None = None) -> Target:
    """A target that may be counted though it cannot be trained."""
    tuning, dtype = recipe.tuning, compute_dtype(config, recipe.model.dtype)
    refuse_foreign_packing(config, name)
    refused = None
    try:
        refuse_other_packing(config, tuning, name)
        refuse_row_length(config, recipe.data.sequence_length, name, packed=recipe.data.packing)
    except UserError as error:
        refused = str(error)
    return replace(_tuned(config, tuning, name, dtype, stored), not_trainable=refused)


def _tuned(
    config: Mapping[str, Any],
    tuning: TuningSection,
    name: str,
    dtype: str,
    stored: Stored | None = None,
) -> Target:
    packed = stored_quantization(config, tuning, name)
    plain = config if tuning.type == "full" else unpacked(config)
    rebuild = partial(build_model, plain, name)
    model = rebuild()
    if stored is not None:
        tensors = settle(model, stored, name)
        if packed is not None:
            quantize_as_stored(model, packed, tensors, name)
        refuse_unread(model, tensors, config, name)
    if tuning.type == "full":
        freeze_other_parts(model, tuning, name)
    else:
        model.freeze()
    base = describe(model, plain, name, dtype)
    refuse_dropped_head(base, stored or {}, name)
    if tuning.type == "full" and tuning.qat is None:
        return Target(model, base, base, rebuild)
    if tuning.type == "full":
        put_ternary(model, tuning.qat_group or GROUP, name)
        return Target(model, describe(model, plain, name, dtype), base, rebuild, ternary=True)
    choose = None
    if packed is not None and stored is None:  # a model of a packed folder's kind, without its weights
        choose = as_stored(config)
    elif packed is None and (packing := quant_format_of(tuning)) is not None:
        choose = uniformly(packing)
    if choose is not None:
        quantize_modules(model, choose, name)
    adapters = adapt(model, tuning)
    return Target(model, describe(model, plain, name, dtype), base, rebuild, adapters, choose)


def in_dtype(spec: ModelSpec, dtype: str) -> ModelSpec:
    """The model computing in `dtype`; tensors that are kept in another dtype than the model's stay as they are."""
    if spec.dtype == dtype:
        return spec
    units = tuple(
        replace(u, tensors=tuple(replace(t, dtype=dtype) if t.dtype == spec.dtype else t for t in u.tensors))
        for u in spec.units
    )
    return replace(spec, dtype=dtype, units=units)
