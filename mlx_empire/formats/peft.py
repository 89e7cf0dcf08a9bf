"""PEFT's adapters (Hugging Face, torch) and mlx-lm's: the same numbers under other names, transposed.

| mlx-lm                                     | PEFT                                                             |
|--------------------------------------------|------------------------------------------------------------------|
| X.lora_a (inputs, rank)                    | base_model.model.X.lora_A.weight (rank, inputs)                  |
| X.lora_b (rank, outputs)                   | base_model.model.X.lora_B.weight (outputs, rank)                 |
| X.m (outputs), DoRA's magnitude            | base_model.model.X.lora_magnitude_vector (outputs)               |
| X.lora_a, .lora_b of an embedding          | base_model.model.X.lora_embedding_A, .lora_embedding_B           |
| scale                                      | lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora          |
| num_layers, keys inside a layer            | target_modules                                                   |

Modules are called as in mlx-lm, but for the language model inside a vision-language one: mlx-lm's
`language_model.model` is `model.language_model` in transformers' classes, whose head stands at the top. All spellings
of hf_names.py are read.

mlx-lm's settings say the same of each of the last layers; where a PEFT adapter leaves some out, they get matrices of
zeros, which add nothing. What has no counterpart is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mlx_empire.errors import UserError
from mlx_empire.formats.hf_names import AS_MLX_LM, AS_TRANSFORMERS, NAMINGS, renamed
from mlx_empire.model.lora import AdapterSettings
from mlx_empire.model.spec import ModelSpec, TensorSpec, is_embedding

PEFT_NAME = "peft"
PEFT_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
ENDINGS = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_embedding_A": "lora_a",
    "lora_embedding_B": "lora_b",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
}
WRAPPED_ALIKE = frozenset({"llama4", "kimi_vl"})  # whose classes wrap a language model as mlx-lm does
# Settings of PEFT's that change the function and have no counterpart, and the values that mean "not used".
UNUSED: tuple[object, ...] = (None, False, [], {}, 0)
FOREIGN = (
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "velora_config",
    "arrow_config",
)


def no_peft_form(spec: ModelSpec, *, huggingface: bool) -> str | None:
    """Why the adapters of the tuned model `spec` cannot be written for PEFT; None where they can."""
    if not huggingface:
        return f"mlx-lm calls the modules of {spec.family} otherwise than Hugging Face"
    trained = [t for u in spec.units for t in u.tensors if t.trainable]
    if any(len(t.shape) == 3 for t in trained):
        return "it has no stacked experts as mlx-lm has them"
    tables = [t.name for t in spec.units[0].tensors if t.name.endswith(".weight") and len(t.shape) == 2]
    if all(map(is_embedding, tables)) and any(t.trainable for t in spec.units[0].tensors):
        return "it adapts an embedding that is tied to the head on one side only"
    return None


def transformers_path(stem: str, spec: ModelSpec) -> str:
    """What transformers calls a module of mlx-lm's, once its class is built: whatever spelling older folders have."""
    return renamed(stem, AS_MLX_LM if spec.family in WRAPPED_ALIKE else AS_TRANSFORMERS)


def peft_weights(weights: Mapping[str, mx.array], spec: ModelSpec) -> dict[str, mx.array]:
    """mlx-lm's tensors of the model `spec` under PEFT's names, in PEFT's orientation."""
    found = {}
    for name, array in weights.items():
        stem, _, leaf = name.rpartition(".")
        kind = "lora_embedding_{}" if is_embedding(stem) else "lora_{}.weight"
        ending = "lora_magnitude_vector" if leaf == "m" else kind.format(leaf[-1].upper())
        found[f"{PREFIX}{transformers_path(stem, spec)}.{ending}"] = mx.contiguous(array.T)
    return found


def peft_config(
    settings: AdapterSettings, weights: Mapping[str, mx.array], spec: ModelSpec, base: str
) -> dict[str, Any]:
    """PEFT's `adapter_config.json`; `spec` is the tuned model."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.scale * settings.rank,
        "lora_dropout": settings.dropout,
        "use_dora": settings.dora,
        "use_rslora": False,  # the scale is in lora_alpha, whichever way it came about
        "target_modules": _target_modules({n.rpartition(".")[0] for n in weights}, spec),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _target_modules(adapted: set[str], spec: ModelSpec) -> list[str]:
    """Last names where these mean exactly the adapted modules, else whole paths: towers beside it may use the same."""
    if any(stem.startswith("language_model.") for stem in adapted):
        return sorted(transformers_path(stem, spec) for stem in adapted)
    modules = {
        re.sub(r"\.(linear|embedding)$", "", t.name.removesuffix(".weight"))
        for u in spec.units
        for t in u.tensors
        if t.name.endswith(".weight") and len(t.shape) >= 2
    }
    leaves = {stem.rpartition(".")[2] for stem in adapted}
    meant = {stem for stem in modules if stem.rpartition(".")[2] in leaves}
    return sorted(leaves) if meant == adapted else sorted(adapted)


def from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, mx.array], base: ModelSpec, where: str
) -> tuple[AdapterSettings, dict[str, mx.array]]:
    """An adapter of PEFT's in mlx-lm's terms, float32; `base` is the model without adapters. UserError."""
    rank, scale = _rank_and_scale(config, where)
    matrices = {
        t.name.removesuffix(".weight"): (i, t)
        for i, u in enumerate(base.units)
        for t in u.tensors
        if t.name.endswith(".weight") and len(t.shape) == 2
    }
    found = _named(tensors, {renamed(stem, naming): stem for naming in NAMINGS for stem in matrices}, where)
    stems = {name.rpartition(".")[0] for name in found}
    for stem in sorted(stems - matrices.keys()):
        raise UserError(f"{where}: it adapts {stem}, which {base.name} does not have")
    in_layers = {stem for stem in stems if matrices[stem][0] > 0}
    first = min((matrices[stem][0] for stem in in_layers), default=len(base.units) - 1)
    inner = {stem.removeprefix(f"{base.units[matrices[stem][0]].name}."): None for stem in sorted(in_layers)}
    keys = (*inner, *sorted(stems - in_layers))
    dora = bool(config.get("use_dora"))
    for unit in base.units[first:]:
        for stem in (f"{unit.name}.{key}" for key in inner):
            if stem in stems or stem not in matrices:
                continue
            if dora:
                raise UserError(
                    f"{where}: DoRA adapts {stem.rpartition('.')[2]} of some layers only, not {stem}"
                )
            found |= _nothing(stem, matrices[stem][1], rank)
    for stem in stems:
        _check(stem, matrices[stem][1], found, rank, where)
    settings = AdapterSettings(
        dora, len(base.units) - first, rank, scale, float(config.get("lora_dropout") or 0), keys
    )
    return settings, {name: array.astype(mx.float32) for name, array in sorted(found.items())}


def _rank_and_scale(config: Mapping[str, Any], where: str) -> tuple[int, float]:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{where}: peft_type {kind}; only LORA can be converted")
    used = [key for key in FOREIGN if config.get(key) not in UNUSED]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise UserError(f"{where}: it uses {used[0]}, for which mlx-lm has no counterpart")
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        if rank < 1:
            raise ValueError(f"r is {rank}")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: r and lora_alpha must be numbers ({error})") from None
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _named(tensors: Mapping[str, mx.array], modules: Mapping[str, str], where: str) -> dict[str, mx.array]:
    """Tensors by mlx-lm's names and orientation; the base's own weights that PEFT saves beside them are passed over.

    `modules`: mlx-lm's names by all that PEFT may use.
    """
    found = {}
    for name, array in tensors.items():
        if ".base_layer." in name:
            continue
        ending = next((e for e in ENDINGS if name.endswith(f".{e}")), None)
        if ending is None or not name.startswith(PREFIX):
            raise UserError(f"{where}: tensor {name!a} is no part of a LoRA adapter that can be converted")
        stem = name.removeprefix(PREFIX).removesuffix(f".{ending}")
        stem = modules.get(stem, stem)
        found[f"{stem}.{ENDINGS[ending]}"] = array.reshape(-1) if ENDINGS[ending] == "m" else array.T
    if not found:
        raise UserError(f"{where}: no adapter's tensors are in it")
    return found


def _shapes(matrix: TensorSpec, rank: int) -> dict[str, tuple[int, ...]]:
    outputs, inputs = matrix.shape
    inputs = inputs * 32 // matrix.bits if matrix.bits else inputs
    if is_embedding(matrix.name):
        outputs, inputs = inputs, outputs
    return {"lora_a": (inputs, rank), "lora_b": (rank, outputs), "m": (outputs,)}


def _nothing(stem: str, matrix: TensorSpec, rank: int) -> dict[str, mx.array]:
    shapes = _shapes(matrix, rank)
    return {f"{stem}.{leaf}": mx.zeros(shapes[leaf]) for leaf in ("lora_a", "lora_b")}


def _check(stem: str, matrix: TensorSpec, found: Mapping[str, mx.array], rank: int, where: str) -> None:
    for leaf, shape in _shapes(matrix, rank).items():
        array = found.get(f"{stem}.{leaf}")
        if array is None and leaf != "m":
            raise UserError(f"{where}: {stem} has no {leaf}")
        if array is not None and tuple(array.shape) != shape:
            raise UserError(f"{where}: {leaf} of {stem} is {tuple(array.shape)}, expected {shape}")
