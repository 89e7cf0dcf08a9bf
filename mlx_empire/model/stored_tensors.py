"""A folder's tensors in the names, layouts and dtypes from which mlx-lm's `sanitize` of the family starts.

Decides what is done to stored tensors before mlx-lm sees them, where it would refuse what transformers 5 saves or
compute with other numbers than torch: gpt-oss's experts that are not packed in MXFP4, GPT-2 and Olmo Hybrid under other
names, experts of Qwen one by one or with the outputs first, exponents of FP8's power-of-two scales, BitNet's packed
matrices, and norms to which 1 is added in the dtype in which they are stored. What is exported never needs any of it,
but in BitNet's layout. All on lazy arrays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from mlx_empire.model.bitnet import SCALE, spell_packed

HALF = (mx.bfloat16, mx.float16)
RENAMED: Mapping[
    str, Mapping[str, str]
] = {  # mlx-lm's module -> part of a name as stored, as the module has it
    "gpt2": {"transformer.": ""},
    "olmo_hybrid": {
        ".attention_layer_norm.": ".input_layernorm.",
        ".feedforward_layer_norm.": ".post_attention_layernorm.",
    },
}
# Stacked experts: stored (experts, inputs, outputs), and mlx-lm's module wants the outputs first, as a `.weight`.
INPUTS_FIRST: Mapping[str, tuple[str, ...]] = {"gpt_oss": (".experts.gate_up_proj", ".experts.down_proj")}
# The other way round, if transformers 5 wrote them; it no longer has the layout of the published folders.
OUTPUTS_FIRST = frozenset({"qwen3_vl_moe"})
STACKED = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
ONE_BY_ONE = frozenset({"qwen3_5_moe"})  # whose module wants each layer's experts in one tensor
ONE_EXPERT = re.compile(r"(.+\.mlp)\.experts\.(\d+)\.(\w+\.weight)")
SCALES = ".weight_scale_inv"  # of FP8 in blocks
EXPONENT_BIAS = 127  # of a scale that is stored as its exponent (E8M0), which mlx loads as uint8
PACKED_GROUP = 32  # blocks of so many inputs stay packed in MLX's mxfp8, whose scales are such exponents


def spell_tensors(model: nn.Module, stored: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """`stored` (name -> array, as in the folder) as the module of `model` expects them; most come back as they are."""
    module = type(model).__module__.rpartition(".")[2]
    found: dict[str, mx.array] = {}
    for name, array in stored.items():
        spelled = name
        for part, ours in RENAMED.get(module, {}).items():
            spelled = spelled.replace(part, ours)
        if name.endswith(INPUTS_FIRST.get(module, ())):
            spelled, array = f"{spelled}.weight", mx.swapaxes(array, 1, 2)
        elif module in OUTPUTS_FIRST and name.endswith(STACKED) and _outputs_first(name, stored):
            array = mx.swapaxes(array, 1, 2)
        elif array.ndim == 1 and array.dtype in HALF:
            array = array.astype(mx.float32)  # as a rank keeps it anyway; 1 + w would be rounded otherwise
        elif name.endswith(SCALES) and array.dtype == mx.uint8 and not _stays_packed(name, array, stored):
            array = mx.power(2.0, array.astype(mx.float32) - EXPONENT_BIAS)
        found[spelled] = array
    if any(name.endswith(SCALE) and array.shape == (1,) for name, array in found.items()):
        found = spell_packed(found)
    return _stacked(found) if module in ONE_BY_ONE else found


def _outputs_first(name: str, stored: Mapping[str, mx.array]) -> bool:
    """Whether a layer's experts lie (experts, outputs, inputs): down_proj's outputs are the inputs of the router."""
    layer = name.rpartition(".experts.")[0]
    down, router = stored.get(f"{layer}.experts.down_proj"), stored.get(f"{layer}.gate.weight")
    return down is not None and router is not None and down.shape[1] == router.shape[-1]


def _stays_packed(name: str, scales: mx.array, stored: Mapping[str, mx.array]) -> bool:
    weight = stored.get(name.removesuffix("_scale_inv"))
    return weight is not None and weight.shape[-1] == PACKED_GROUP * scales.shape[-1]


def _stacked(stored: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Experts that are stored one by one as one tensor (experts, outputs, inputs) by mlx-lm's name for it."""
    found: dict[str, mx.array] = {}
    experts: dict[str, dict[int, mx.array]] = {}
    for name, array in stored.items():
        if one := ONE_EXPERT.fullmatch(name):
            experts.setdefault(f"{one[1]}.switch_mlp.{one[3]}", {})[int(one[2])] = array
        else:
            found[name] = array
    return found | {name: mx.stack([e[i] for i in sorted(e)]) for name, e in experts.items()}
