"""Putting mlx-lm's adapter layers into a lazily built model, so that it can be described with a frozen base.

Decides which modules get an adapter: linear ones of the decoder layers (never a mixture's router), all of them or
those that `tuning.targets` names; `experts` stands for the stacked matrices of a mixture's experts; embedding and
head only where they are named, and without dropout. mlx-lm's own function makes the layers from the very settings
that `adapter_config.json` will hold, so what was trained is what `mlx_lm.load(..., adapter_path=...)` builds.

The values that adapters start from are a function of the run's seed and the tensor's name, or of the base's weights:
`lora_a` is uniform in +-1 / sqrt(inputs), as mlx-lm draws it, from a key of its own, so neither the number of ranks
nor the other tensors matter; `lora_b` is zero, so training starts from the base's own output; DoRA's magnitude is the
norm of each of the base's rows.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.dora import DoRALinear

from mlx_empire.errors import UserError
from mlx_empire.model.build import find_layers
from mlx_empire.model.mlx_lm_modules import put_adapters_in
from mlx_empire.model.parts import last_layers
from mlx_empire.model.spec import TensorSpec, is_router, own_name
from mlx_empire.recipe.sections import TuningSection

WORD_BITS = 32  # in which packed codes lie
DEFAULT_RANK = 8
EXPERTS = "experts"  # the target that stands for the stacked matrices of a mixture's experts
ALL_LINEAR = "all-linear"  # the one that stands for every linear module of the layers but routers and experts
DEFAULT_SCALE = 2.0  # alpha = 2 x rank, as is usual; mlx-lm's own default is a scale of 20, whatever the rank


@dataclass(frozen=True)
class AdapterSettings:
    """What mlx-lm needs to build the same layers: `keys` are module names, inside a layer or (embedding, head) inside
    the model; `layers` counts the last ones.
    """

    dora: bool
    layers: int
    rank: int
    scale: float
    dropout: float
    keys: tuple[str, ...]

    def parameters(self) -> dict[str, Any]:
        """mlx-lm's `lora_parameters`."""
        return {"rank": self.rank, "scale": self.scale, "dropout": self.dropout, "keys": list(self.keys)}

    def config(self) -> dict[str, Any]:
        """What `adapter_config.json` must hold."""
        kind = "dora" if self.dora else "lora"
        return {"fine_tune_type": kind, "num_layers": self.layers, "lora_parameters": self.parameters()}


def adapt(model: nn.Module, tuning: TuningSection) -> AdapterSettings:
    """Freeze `model` and put trainable adapters into it. UserError for targets or layers that it does not have."""
    layers = last_layers(tuning.layers, len(model.layers))
    rank = tuning.rank or DEFAULT_RANK
    alpha = DEFAULT_SCALE * rank if tuning.alpha is None else tuning.alpha
    scale = alpha / math.sqrt(rank) if tuning.rslora else alpha / rank
    keys = _keys(model, layers, tuning)
    settings = AdapterSettings(tuning.type == "dora", layers, rank, scale, tuning.dropout or 0.0, keys)
    model.freeze()
    put_in(model, settings)
    for path, module in model.named_modules():
        if path in keys:  # by its whole path: it belongs to no layer
            module.dropout = nn.Dropout(0.0)
        if isinstance(module, DoRALinear) and WORD_BITS % getattr(module.linear, "bits", 1):
            raise UserError(
                f"tuning.type: dora: {path} is stored in {module.linear.bits} bits, for which mlx-lm's DoRA takes a "
                "wrong width; use type lora, or a folder in 8, 4 or 2 bits"
            )
    return settings


def put_in(model: nn.Module, settings: AdapterSettings) -> None:
    """Put mlx-lm's layers into a model; KeyError or ValueError where they do not fit."""
    put_adapters_in(model, settings.layers, settings.parameters(), settings.dora)


def targets_of(tuning: TuningSection) -> tuple[str, ...]:
    """What the recipe asks adapters for."""
    if tuning.targets is None or isinstance(tuning.targets, str):
        return (ALL_LINEAR,)
    return tuning.targets


def is_target(module: str, target: str) -> bool:
    """Whether `target` names `module` (both as paths inside a layer): the whole path or its last parts."""
    return module == target or module.endswith("." + target)


def _keys(model: nn.Module, layers: int, tuning: TuningSection) -> tuple[str, ...]:
    """Names of the modules that get an adapter: inside a layer, or of the root inside the model."""
    linear, stacked = _in_layers(model, layers)
    root = _in_root(model)
    chosen: dict[str, None] = {}
    for target in targets_of(tuning):
        found = [k for k in linear if target == ALL_LINEAR or is_target(k, target)]
        if target == EXPERTS and stacked:
            _refuse_dora(tuning, target, "stacked experts")
            found += stacked
        for key in (k for k in root if is_target(k, target)):
            if isinstance(root[key], nn.Embedding | nn.QuantizedEmbedding):
                _refuse_dora(tuning, target, "embeddings that keeps their dtype")
            found.append(key)
        if not found:
            known = sorted(
                {k.rpartition(".")[2] for k in (*linear, *root)} | ({EXPERTS} if stacked else set())
            )
            raise UserError(
                f"tuning.targets: {target}: no linear module is called so; there are {', '.join(known)}"
            )
        chosen |= dict.fromkeys(found)
    return tuple(chosen)


def _in_layers(model: nn.Module, layers: int) -> tuple[dict[str, None], dict[str, None]]:
    """Linear modules of the last layers but routers, and stacked experts: their names inside a layer."""
    linear: dict[str, None] = {}
    stacked: dict[str, None] = {}
    for layer in model.layers[-layers:]:
        for key, module in layer.named_modules():
            if isinstance(module, SwitchLinear | QuantizedSwitchLinear):
                stacked[key] = None
            elif isinstance(module, nn.Linear | nn.QuantizedLinear) and not is_router(f"{key}.weight"):
                linear[key] = None
    return linear, stacked


def _in_root(model: nn.Module) -> dict[str, nn.Module]:
    """Embeddings and heads, by their paths."""
    _, _, prefix = find_layers(model, "the model")
    kinds = nn.Linear | nn.QuantizedLinear | nn.Embedding | nn.QuantizedEmbedding
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, kinds) and not path.startswith(f"{prefix}.")
    }


def _refuse_dora(tuning: TuningSection, target: str, what: str) -> None:
    if tuning.type == "dora":
        raise UserError(f"tuning.targets: {target}: mlx-lm has no DoRA for {what}; use type lora")


def initial_adapter(tensor: TensorSpec, seed: int) -> mx.array:
    """`lora_a` or `lora_b` before the first step, in float32. Stacked experts have their inputs last."""
    if tensor.name.endswith(".lora_b"):
        return mx.zeros(tensor.shape)
    assert tensor.name.endswith(".lora_a"), tensor.name
    inputs = tensor.shape[-1] if len(tensor.shape) == 3 else tensor.shape[0]
    bound = 1 / math.sqrt(inputs)
    _, name = own_name(tensor.name)  # trained together or alone, a daughter begins alike
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    key = mx.random.key(int.from_bytes(digest[:8], "little"))
    return mx.random.uniform(-bound, bound, tensor.shape, key=key)


def as_first_values(array: mx.array) -> mx.array:
    """A tensor of an earlier adapter as the one that goes on from it begins: float32, contiguous, evaluated."""
    with mx.stream(mx.cpu):
        array = mx.contiguous(array.astype(mx.float32))
    mx.eval(array)
    return array


def magnitude(weight: mx.array) -> mx.array:
    """DoRA's `m` of a matrix (outputs, inputs): the norm of each row, in float32."""
    return mx.linalg.norm(weight.astype(mx.float32), axis=1)
