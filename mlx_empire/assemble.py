"""What the verbs have in common: from a recipe and the ranks to nodes, model, data and plan, the same on all ranks.

Rank 0 reads what only it may have (recipe, hostfile, the model's configuration) and broadcasts it; errors that a
user can mend are agreed on, said once, and end all ranks with the same exit code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_empire.adapters.layers import AdapterSettings, adapt
from mlx_empire.adapters.quantised import quantise, quantise_as_stored, stored_quantisation, unpacked
from mlx_empire.checkpoint.folder import Stored, has_weights, open_folder, refuse_dropped_head, settle
from mlx_empire.checkpoint.freeze import verify
from mlx_empire.comm.failure import together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.errors import UserError
from mlx_empire.plan.describe import build_model, compute_dtype, describe
from mlx_empire.plan.model import ModelSpec
from mlx_empire.plan.packing import Packing, packing_of, stored_packing
from mlx_empire.recipe.schema import Recipe
from mlx_empire.recipe.sections import TuningSection


@dataclass(frozen=True)
class Built:
    """The model to train. `spec` is what is trained, `base` what is read from its folder: the same for full tuning.

    `rebuild` makes mlx-lm's own model anew, lazily and without adapters; `adapters` is None for full tuning;
    `packing` is how the base is packed while it is loaded.
    """

    model: nn.Module
    spec: ModelSpec
    base: ModelSpec
    rebuild: Callable[[], nn.Module]
    adapters: AdapterSettings | None
    packing: Packing | None = None


def build(comm: Communicator, recipe: Recipe, config: Mapping[str, Any]) -> Built:
    """The model, lazily, settled for its folder and tuned as asked, and its description."""
    folder, digest = recipe.model.path, recipe.model.base_digest
    stored = None
    with together(comm):
        if digest is not None and (comm.rank == 0 or has_weights(folder)):
            verify(folder, digest)
        if comm.rank == 0 and recipe.model.init == "pretrained":
            stored = open_folder(folder).stored()
    stored = comm.broadcast_json(stored)
    with together(comm):
        dtype = compute_dtype(config, recipe.model.dtype)
        built = tuned_model(config, recipe.tuning, str(folder), dtype, stored)
        refuse_impossible(built.spec)
    return built


def tuned_model(
    config: Mapping[str, Any], tuning: TuningSection, name: str, dtype: str, stored: Stored | None = None
) -> Built:
    """The model of `config` with the adapters that `tuning` asks for; `stored` describes its folder, if it has one."""
    packed = stored_quantisation(config, tuning, name)
    plain = config if tuning.type == "full" else unpacked(config)

    def rebuild() -> nn.Module:
        return build_model(plain, name)

    model = rebuild()
    names = settle(model, stored, name) if stored is not None else frozenset()
    if tuning.type == "full":
        spec = describe(model, plain, name, dtype)
        refuse_dropped_head(spec, stored or {}, name)
        return Built(model, spec, spec, rebuild, None)
    if packed is not None and stored is not None:
        quantise_as_stored(model, packed, names)
    model.freeze()
    base = describe(model, plain, name, dtype)
    refuse_dropped_head(base, stored or {}, name)
    packing = packing_of(tuning) if packed is None else None
    if packed is not None and stored is None:  # a random model of a packed folder's kind
        packing = stored_packing(packed)
    if packing is not None:
        quantise(model, packing, name)
    adapters = adapt(model, tuning)
    return Built(model, describe(model, plain, name, dtype), base, rebuild, adapters, packing)


def with_adapter(plain: Built, settings: AdapterSettings) -> ModelSpec:
    """The plain model with the adapters that `settings` describe, wherever they come from."""
    model = plain.rebuild()
    model.freeze()
    try:
        linear_to_lora_layers(model, settings.layers, settings.parameters(), use_dora=settings.dora)
    except (KeyError, ValueError) as error:
        raise UserError(f"{plain.spec.name}: mlx-lm cannot put such an adapter into it: {error}") from None
    return describe(model, plain.spec.config, plain.spec.name, plain.spec.dtype)


def refuse_impossible(spec: ModelSpec) -> None:
    """UserError for stacked experts in bfloat16 on a CPU, which MLX cannot multiply there."""
    plain = (t for u in spec.units for t in u.tensors if t.name.endswith(".weight"))
    stacked = any(len(t.shape) == 3 and t.dtype == "bfloat16" for t in plain)
    if stacked and mx.default_device().type == mx.DeviceType.cpu:
        raise UserError(
            f"model.dtype: bfloat16: MLX on a CPU multiplies the experts of {spec.family} in float32 only; "
            "set model.dtype: float32, or train on a GPU"
        )
