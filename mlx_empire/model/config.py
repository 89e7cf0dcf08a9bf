"""Reading a model's configuration: the one place where `config.json` (and the catalog's) is opened and completed.

Decides what every reader after it may rely on: RoPE stands in the spelling of mlx-lm's module, packed weights in MLX's
own (packing_config.py), other keys by the names that the module reads (spelling.py), tagged floats are numbers, dtypes
have MLX's names, and tie_word_embeddings is explicit wherever it can be known. What the file leaves open, the folder's
tensors and then transformers' defaults decide, because mlx-lm's own defaults are often others. What the module would
leave out is refused (unread.py). The file itself is never touched.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from mlx_empire.errors import UserError
from mlx_empire.model.family_defaults import TIED, UNTIED
from mlx_empire.model.mlx_lm_modules import classes_of
from mlx_empire.model.packing_config import QUANTISATION_KEYS, spell_packing
from mlx_empire.model.rope import spell_rope
from mlx_empire.model.spelling import spell_keys

MAX_CONFIG_BYTES = 4 << 20
MAX_HEADER_BYTES = 100 << 20
TIE = "tie_word_embeddings"
BESIDE = "hf_quant_config.json"  # where NVIDIA's ModelOpt says how it packed
HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
FLOAT_TAG = "__float__"
DTYPE_KEYS = ("torch_dtype", "dtype")
DTYPE_NAMES = {
    **dict.fromkeys(("bf16",), "bfloat16"),
    **dict.fromkeys(("fp16", "half"), "float16"),
    **dict.fromkeys(("fp32", "float"), "float32"),
}
CODES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # of safetensors
DTYPES = tuple(CODES.values())

# Where mlx-lm's module hands text_config (or all of it) to another dataclass than its own ModelArgs.
TEXT_READERS: Mapping[str, str] = {
    "gemma3": "gemma3_text.ModelArgs",
    "gemma3n": "gemma3n.TextConfig",
    "gemma4": "gemma4_text.ModelArgs",
    "kimi_k25": "deepseek_v3.ModelArgs",
    "kimi_k3": "kimi_k3.TextArgs",
    "kimi_vl": "kimi_vl.TextArgs",
    "lfm2-vl": "lfm2.ModelArgs",
    "llama4": "llama4.TextArgs",
    "minimax_m3_vl": "minimax_m3_vl.TextArgs",
    "mistral3": "llama.ModelArgs",
    "mistral3/ministral3": "ministral3.ModelArgs",
    "mistral3/mistral4": "mistral4.ModelArgs",
    "muse_spark": "muse_spark.TextArgs",
    "pixtral": "llama.ModelArgs",
    "qwen2_vl": "qwen2.ModelArgs",
    "qwen3_5": "qwen3_5.TextModelArgs",
    "qwen3_5_moe": "qwen3_5.TextModelArgs",
    "qwen3_vl": "qwen3.ModelArgs",
    "qwen3_vl_moe": "qwen3_moe.ModelArgs",
}
# Whose wrapping module writes a vocab_size of its own into text_config, where transformers reads the latter's.
OWN_VOCABULARY = frozenset({"gemma3_text", "gemma4_text"})


def read_config(folder: Path) -> dict[str, Any]:
    """The completed `config.json` of a Hugging Face folder; one that is missing or damaged is a UserError."""
    path = folder / "config.json"
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError(f"{path}: {path.stat().st_size} bytes is no model configuration")
        config = untagged(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        if (folder / "adapter_config.json").exists():
            raise UserError(
                f"{folder}: an adapter, and no model; name its base in model.path and go on from it by tuning.start, "
                "or first put it into the base by mlx_lm.fuse (for PEFT's: merge_and_unload)"
            ) from None
        raise UserError(f"{path}: {error.strerror}; model.path must be a local Hugging Face folder") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({str(error)[:80]}); fetch the model again") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{path}: model_type is missing; this is no language model's configuration")
    beside = folder / BESIDE
    if not any(config.get(key) for key in QUANTISATION_KEYS) and beside.exists():
        try:
            config["quantization_config"] = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{beside}: not valid JSON ({str(error)[:80]}); fetch the model again") from None
    try:
        _spell_dtypes(config, folder)
        return complete(config, str(path), _stored_names(folder))
    except RecursionError:
        raise UserError(f"{path}: nested too deeply for a model's configuration") from None


def untagged(value: Any) -> Any:
    """Numbers for what transformers 5 writes as `{"__float__": "Infinity"}`, since JSON has no word for them."""
    if isinstance(value, dict):
        if value.keys() == {FLOAT_TAG} and str(value[FLOAT_TAG]).lower().lstrip("+-") in (
            "inf",
            "infinity",
            "nan",
        ):
            return float(value[FLOAT_TAG])
        return {key: untagged(inner) for key, inner in value.items()}
    return [untagged(inner) for inner in value] if isinstance(value, list) else value


def tagged(value: Any) -> Any:
    """The other way round, so that what is written is JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return {FLOAT_TAG: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, dict):
        return {key: tagged(inner) for key, inner in value.items()}
    return [tagged(inner) for inner in value] if isinstance(value, list) else value


def _spell_dtypes(config: dict[str, Any], folder: Path) -> None:
    """Dtypes by MLX's names; where the configuration is silent that in which most of the weights are stored."""
    text = config.get("text_config")
    parts = [part for part in (config, text) if isinstance(part, dict)]
    said = [(part, key) for part in parts for key in DTYPE_KEYS if isinstance(part.get(key), str)]
    for part, key in said:
        name = part[key].lower().removeprefix("torch.")
        part[key] = DTYPE_NAMES.get(name, name)
    if not any(part[key] in DTYPES for part, key in said):
        counts = Counter[str]()
        for info in _headers(folder).values():
            if info.get("dtype") in CODES:
                counts[CODES[info["dtype"]]] += math.prod(
                    n for n in info.get("shape", []) if isinstance(n, int)
                )
        for name, _ in counts.most_common(1):
            config["torch_dtype"] = name


def complete(config: Mapping[str, Any], where: str, stored: Collection[str] = ()) -> dict[str, Any]:
    """A copy of `config` with RoPE as mlx-lm reads it and tie_word_embeddings; completing it again changes nothing.

    `stored`: names of the folder's tensors, as far as they can be known. UserError (naming `where`) for a RoPE that
    mlx-lm's module cannot do. A family that mlx-lm lacks comes back without its RoPE looked at.
    """
    done: dict[str, Any] = untagged(copy.deepcopy(dict(config)))
    spell_packing(done, stored)
    if done.get("quantize_activations"):
        raise UserError(
            f"{where}: quantize_activations: true: mlx-lm then rounds what enters each matrix, which has no gradient; "
            "set it to false, which trains on the same weights"
        )
    kind, text = str(done["model_type"]), done.get("text_config")
    reader = reader_of(done)
    section = text if isinstance(text, dict) else done
    if reader is not None:
        module, read = reader
        family = section.get("model_type") or f"{kind}_text"
        try:
            spelled = spell_rope({**section, "model_type": family}, read, module, where)
        except UserError:
            raise
        except (TypeError, ValueError, ArithmeticError) as error:  # numbers that are none
            raise UserError(
                f"{where}: its RoPE cannot be read ({str(error)[:80]}); fetch the model again"
            ) from None
        section.update({k: v for k, v in spelled.items() if k != "model_type"})
        spell_keys(section, read, module, family, where, stored)
        if section is not done and module in OWN_VOCABULARY and "vocab_size" in section:
            done["vocab_size"] = section["vocab_size"]
    tied = _tied(done, section, reader, stored)
    if tied is not None:
        section[TIE] = tied
        done[TIE] = tied
    return done


def reader_of(config: Mapping[str, Any]) -> tuple[str, dict[str, Field[Any]]] | None:
    """(mlx-lm's module, the fields into which it reads the language model's part); None where it has none."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # AI2's olmo prints what it lacks
            model, arguments = classes_of(config)
        module = model.__module__.rpartition(".")[2]
        text = config.get("text_config")
        nested = f"{module}/{text.get('model_type')}" if isinstance(text, Mapping) else module
        name = TEXT_READERS.get(nested, TEXT_READERS.get(module))
        if name is not None:
            module, _, kind = name.rpartition(".")
            arguments = getattr(importlib.import_module(f"mlx_lm.models.{module}"), kind)
    except (Exception, SystemExit):  # the family is not there or cannot be imported: build_model says so
        return None
    return (module, {f.name: f for f in fields(arguments)}) if is_dataclass(arguments) else None


def _tied(
    config: Mapping[str, Any],
    section: Mapping[str, Any],
    reader: tuple[str, dict[str, Field[Any]]] | None,
    stored: Collection[str],
) -> bool | None:
    """Whether embedding and head are one tensor: as said, else as stored, else transformers' default."""
    said = [part[TIE] for part in (section, config) if isinstance(part.get(TIE), bool)]
    if said and len(set(said)) == 1:
        return bool(said[0])
    families = [str(part.get("model_type")) for part in (config, section)]
    default = next((name in TIED for name in families if name in TIED | UNTIED), None)
    free = reader is not None and TIE in reader[1]  # other modules have one of the two built in
    if stored and free:
        return not any(name.endswith(HEADS) for name in stored)
    return bool(said[0]) if said else default


def _stored_names(folder: Path) -> frozenset[str]:
    """Names of the tensors of a folder; what is damaged counts as absent: opening the folder says what is wrong."""
    try:
        index = folder / "model.safetensors.index.json"
        if index.exists():
            return frozenset(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return frozenset()
    return frozenset(_headers(folder))


def _headers(folder: Path) -> dict[str, dict[str, Any]]:
    """Dtype and shape of every tensor in a folder, by its name, as safetensors has them; {} where one is damaged."""
    found: dict[str, dict[str, Any]] = {}
    try:
        for file in sorted(folder.glob("model*.safetensors")):
            with file.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                found |= json.loads(stream.read(size)) if size <= MAX_HEADER_BYTES else {}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return {}
    return {name: info for name, info in found.items() if name != "__metadata__" and isinstance(info, dict)}
