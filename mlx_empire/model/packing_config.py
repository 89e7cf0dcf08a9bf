"""What a model's folder says of packed weights, whoever wrote it: MLX's own settings, or another method by its name.

Decides which folders of other tools serve as frozen bases. What mlx-lm keeps packed while it loads (its own folders,
the published MXFP4 and MXFP8, NVFP4 of ModelOpt and compressed-tensors, BitNet's) is spelled as MLX's `quantization`,
so that nothing after this has to know who wrote the folder. AWQ, GPTQ, bitsandbytes and the rest are refused in one
line that names them. FP8 in blocks stays as it is: some of mlx-lm's families take it back to bfloat16 while they load.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from mlx_empire.errors import UserError

QUANTISATION_KEYS = ("quantization", "quantization_config")
METHOD = "quant_method"
FP8 = "fp8"
FLOATING: Mapping[str, dict[str, Any]] = {
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
}
BITNET_NAME = "bitnet"  # as quant_method, and as a model_type
BITNET: Mapping[str, Any] = {"group_size": 64, "bits": 2, "mode": "affine"}  # what it becomes (`bitnet`)
COMPRESSED: Mapping[str, dict[str, Any]] = {
    "nvfp4-pack-quantized": FLOATING["nvfp4"],
    "mxfp4-pack-quantized": FLOATING["mxfp4"],
    "pack-quantized": {"group_size": 32, "bits": 4, "mode": "affine"},
}
# Where no configuration says it, the last parts of tensor names do; the first that fits. `stored` has all names.
TRACES: tuple[tuple[tuple[str, ...], str], ...] = (
    ((".qweight", ".g_idx"), "gptq"),
    ((".qweight", ".qzeros"), "awq"),
    ((".weight.quant_map",), "bitsandbytes"),
    ((".SCB",), "bitsandbytes"),
    ((".weight_packed",), "compressed-tensors"),
    ((".weight_scale_inv",), FP8),
    (("_proj_blocks", "_proj_scales"), "mxfp4"),
)
TITLES = {"awq": "AWQ", "gptq": "GPTQ", "hqq": "HQQ", BITNET_NAME: "BitNet", "mxfp4": "MXFP4", FP8: "FP8"}
KEPT_KEYS = ("modules_to_not_convert", "ignore", "exclude_modules", "ignored_layers")


def spell_packing(config: dict[str, Any], stored: Collection[str]) -> None:
    """Write into a configuration, in place, what stands elsewhere: `quantization_config` at the top, and MLX's
    `quantization` where mlx-lm would load the weights packed in one of MLX's formats.
    """
    if config.get("quantization"):
        return
    text = config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, Mapping) else None
    if not config.get("quantization_config"):
        method = None if nested else _method_of(stored)
        if not nested and method is None:
            return
        config["quantization_config"] = nested or {METHOD: method}
    found = config["quantization_config"]
    settings = _mlx_settings(found) if isinstance(found, Mapping) else None
    if settings is not None:
        config["quantization"] = dict(settings)


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether weights stay packed once they are loaded, by MLX's format or another; FP8 in blocks does not."""
    found = config.get("quantization_config")
    fp8 = isinstance(found, Mapping) and found.get(METHOD) == FP8
    return bool(config.get("quantization")) or (bool(found) and not fp8)


def packing_method(config: Mapping[str, Any]) -> str:
    """Who packed the weights of a packed folder, as a person would call it."""
    found = config.get("quantization_config")
    said = None
    if isinstance(found, Mapping):
        said = found.get(METHOD) or _algorithm(found)
        said = said or ("bitsandbytes" if any("load_in_" in key for key in found) else None)
    if said is None:
        return "MLX" if config.get("quantization") else "a method that config.json does not name"
    return TITLES.get(str(said), str(said)[:40])


def refuse_foreign_packing(config: Mapping[str, Any], name: str) -> None:
    """UserError naming the method where weights are packed in a format that is not MLX's."""
    if is_packed(config) and not config.get("quantization"):
        raise UserError(foreign_packing(config, name))


def foreign_packing(config: Mapping[str, Any], name: str) -> str:
    """The one line that refuses another method, and what to do."""
    return (
        f"{name}: its weights are quantised by {packing_method(config)}, which is read neither for adapters nor for "
        "full fine-tuning; use the folder that it was made from (for adapters on packed weights: after "
        "mlx_lm.convert -q)"
    )


def keeps_plain(config: Mapping[str, Any], path: str) -> bool:
    """Whether a module (its `path`) is among those that another tool's settings leave as they were.

    Their patterns name modules or whole parts of the model, as `lm_head` or `model.layers.*.self_attn`.
    """
    found = config.get("quantization_config")
    if not isinstance(found, Mapping) or not (METHOD in found or _algorithm(found)):
        return False
    settings = nested if isinstance(nested := found.get("quantization"), Mapping) else found
    listed: list[str] = next((settings[key] for key in KEPT_KEYS if isinstance(settings.get(key), list)), [])
    patterns = [str(p).removeprefix("re:").replace(".*", "*").replace("\\.", ".") for p in listed]
    # transformers packs linear modules alone, never an embedding
    return "embed" in path or any(fnmatchcase(path, q) for p in patterns for q in (p, f"{p}.*", f"*.{p}"))


def _method_of(stored: Collection[str]) -> str | None:
    for endings, method in TRACES:
        if all(any(name.endswith(ending) for name in stored) for ending in endings):
            return method
    return None


def _mlx_settings(found: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """MLX's settings for what mlx-lm loads packed; None for what it does not. As `mlx_lm.utils.load_model` has them."""
    method = found.get(METHOD)
    if method in ("mxfp4", "mxfp8"):
        return FLOATING[method]
    if method == BITNET_NAME:
        return BITNET if _is_offline_bitnet(found) else None
    if method == FP8 and found.get("scale_fmt") == "ue8m0" and found.get("weight_block_size") == [32, 32]:
        return FLOATING["mxfp8"]
    if method == "compressed-tensors":
        return COMPRESSED.get(str(found.get("format"))) if _as_mlx_lm_reads(found) else None
    return FLOATING["nvfp4"] if _algorithm(found) == "NVFP4" else None


def _is_offline_bitnet(found: Mapping[str, Any]) -> bool:
    """Whether BitNet's weights are stored packed, with scales to multiply with, and nothing is normed besides."""
    packed = found.get("quantization_mode", "offline") == "offline"
    return packed and found.get("linear_class") == "autobitlinear" and not found.get("use_rms_norm")


def _as_mlx_lm_reads(found: Mapping[str, Any]) -> bool:
    """Whether compressed-tensors' codes are what mlx-lm takes them for: of 4 bits, about the middle code, in order."""
    groups = found.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        codes = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(codes, Mapping) and (
            codes.get("num_bits", 4) != 4
            or codes.get("symmetric", True) is not True
            or codes.get("actorder") in (True, "group", "dynamic")
        ):
            return False
    return True


def _algorithm(found: Mapping[str, Any]) -> Any:
    """What ModelOpt calls its method; in a file of its own it nests its settings."""
    settings = found.get("quantization", found)
    return settings.get("quant_algo") if isinstance(settings, Mapping) else None
