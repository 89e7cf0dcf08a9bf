"""Tensors as transformers 5 or FP8 checkpoints store them: read as the same model in mlx-lm's layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from formats.stored import Write
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from support.tiny_models import tiny_config

from mlx_empire.errors import UserError
from mlx_empire.formats.hf_folder import open_folder
from mlx_empire.formats.source import FolderSource
from mlx_empire.model.build import build_model
from mlx_empire.model.config import read_config
from mlx_empire.model.target import Target, make_target
from mlx_empire.recipe.sections import TuningSection

TOKENS = mx.array([[1, 7, 200, 31, 4, 90, 12]])
Tensors = dict[str, mx.array]


def loaded(folder: Path, dtype: str = "float32") -> Target:
    """The folder's model with its weights, through the product's own reading. UserError."""
    target = make_target(read_config(folder), TuningSection(), "f", dtype, open_folder(folder).stored())
    source = FolderSource(folder, target.rebuild, target.base)
    for index in range(len(target.spec.units)):
        target.model.load_weights([(t.name, a) for t, a in source.unit(index)], strict=False)
    target.model.eval()
    return target


def parameters(model: nn.Module) -> Tensors:
    return dict(tree_flatten(model.parameters()))


def values_of(config: dict[str, Any]) -> Tensors:
    """Random weights by mlx-lm's names."""
    mx.random.seed(3)
    model = build_model(config, "tiny")
    return {n: 0.3 * mx.random.normal(a.shape) for n, a in parameters(model).items()}


def under_transformers_prefix(values: Tensors) -> Tensors:
    kinds = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2's convolutions: inputs first
    return {
        f"transformer.{n.removeprefix('model.')}": mx.contiguous(a.T) if n.endswith(kinds) else a
        for n, a in values.items()
    }


def gpt_oss_experts(values: Tensors) -> Tensors:
    """Gate and up column by column in one tensor, inputs first."""
    made = {n: a for n, a in values.items() if ".experts." not in n}
    for name in (n for n in values if n.endswith(".experts.gate_proj.weight")):
        owner = name.removesuffix(".gate_proj.weight")
        for leaf in ("weight", "bias"):
            gate, up, down = (values[f"{owner}.{p}_proj.{leaf}"] for p in ("gate", "up", "down"))
            both = mx.stack([gate, up], axis=2).reshape(gate.shape[0], -1, *gate.shape[2:])
            if leaf == "weight":
                made |= {
                    f"{owner}.gate_up_proj": both.swapaxes(1, 2),
                    f"{owner}.down_proj": down.swapaxes(1, 2),
                }
            else:
                made |= {f"{owner}.gate_up_proj_bias": both, f"{owner}.down_proj_bias": down}
    return made


def outputs_first(values: Tensors) -> Tensors:
    made = {n: a for n, a in values.items() if ".switch_mlp." not in n}
    for name in (n for n in values if n.endswith(".switch_mlp.gate_proj.weight")):
        owner = name.removesuffix(".switch_mlp.gate_proj.weight")
        gate, up, down = (values[f"{owner}.switch_mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
        made[f"{owner}.experts.gate_up_proj"] = mx.concatenate([gate, up], axis=1)
        made[f"{owner}.experts.down_proj"] = down
    return as_transformers_wraps(made)


def one_by_one(values: Tensors) -> Tensors:
    made: Tensors = {}
    for name, array in values.items():
        owner, found, rest = name.partition(".switch_mlp.")
        made |= {f"{owner}.experts.{e}.{rest}": a for e, a in enumerate(array)} if found else {name: array}
    return as_transformers_wraps(made)


def as_transformers_wraps(values: Tensors) -> Tensors:
    return {
        n.replace("language_model.model.", "model.language_model.").replace(
            "language_model.lm_head", "lm_head"
        ): a
        for n, a in values.items()
    }


STORED: dict[str, Callable[[Tensors], Tensors]] = {
    "gpt2": under_transformers_prefix,
    "gpt_oss": gpt_oss_experts,
    "qwen3_vl_moe": outputs_first,
    "qwen3_5_moe": one_by_one,
}


@pytest.mark.parametrize("family", STORED)
def test_what_transformers_stores_otherwise_is_the_same_model(family: str, write_folder: Write) -> None:
    config = tiny_config(family)
    values = values_of(config)
    found = parameters(
        loaded(write_folder({**config, "torch_dtype": "float32"}, STORED[family](values))).model
    )
    assert found.keys() == values.keys()
    assert all(mx.array_equal(found[name], array) for name, array in values.items())


def test_the_published_layout_of_qwen3_vl_moe_stays_as_mlx_lm_reads_it(write_folder: Write) -> None:
    config = {**tiny_config("qwen3_vl_moe"), "torch_dtype": "float32"}
    stacked = (".experts.gate_up_proj", ".experts.down_proj")
    tensors = outputs_first(values_of(config))
    tensors = {n: mx.contiguous(a.swapaxes(1, 2)) if n.endswith(stacked) else a for n, a in tensors.items()}
    folder = write_folder(config, tensors)
    found = parameters(loaded(folder).model)
    assert all(mx.array_equal(found[n], a) for n, a in parameters(load_model(folder)[0]).items())


def test_one_is_added_to_stored_norms_without_rounding(write_folder: Write) -> None:
    """mlx-lm adds it in bfloat16; transformers in float32."""
    config = tiny_config("qwen3_next")
    name, experts = "model.layers.0.input_layernorm.weight", ".switch_mlp."
    tensors: Tensors = {}
    for n, a in values_of(config).items():
        owner, found, rest = n.partition(experts)
        half = a.astype(mx.bfloat16)
        tensors |= {f"{owner}.experts.{e}.{rest}": x for e, x in enumerate(half)} if found else {n: half}
    folder = write_folder({**config, "torch_dtype": "bfloat16"}, tensors)
    found = parameters(loaded(folder).model)[name]
    exact = tensors[name].astype(mx.float32) + 1
    assert mx.array_equal(found, exact)
    assert not mx.array_equal(exact.astype(mx.bfloat16).astype(mx.float32), exact)


def test_power_of_two_scales_may_be_stored_as_exponents(write_folder: Write) -> None:
    """FP8 in blocks of 128 x 128: E8M0 scales are read as the float32 ones that mlx_lm.load understands."""
    config = {**tiny_config("deepseek_v3"), "torch_dtype": "float32"}
    values, name = values_of(config), "model.layers.0.self_attn.o_proj.weight"
    packed = values | {name: mx.to_fp8(values[name])}
    how = {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    config["quantization_config"] = how
    exponents = write_folder(config, packed | {f"{name}_scale_inv": mx.array([[125]], mx.uint8)}, name="e8m0")
    numbers = write_folder(config, packed | {f"{name}_scale_inv": mx.array([[0.25]])}, name="float32")
    assert mx.array_equal(loaded(exponents).model(TOKENS), load_model(numbers)[0](TOKENS))


def as_e8m0(file: Path, name: str) -> None:
    """Give a uint8 tensor of a file the dtype that safetensors has for exponents."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header[name]["dtype"] = "F8_E8M0"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def test_safetensors_own_dtype_for_exponents_is_known(write_folder: Write) -> None:
    folder = write_folder(tiny_config("llama"), {"a": mx.array([127, 130], mx.uint8)})
    as_e8m0(folder / "model.safetensors", "a")
    assert open_folder(folder).stored() == {"a": ("uint8", (2,))}
    assert open_folder(folder).load()["a"].tolist() == [127, 130]


def test_integers_that_the_model_lacks_are_refused_as_mlx_lm_does(write_folder: Write) -> None:
    """Zero points, say, without which packed weights would be others."""
    values = values_of(tiny_config("llama"))
    name = "model.layers.0.self_attn.q_proj.weight_zero_point"
    config = {**tiny_config("llama"), "torch_dtype": "float32"}
    folder = write_folder(config, {**values, name: mx.zeros((8,), mx.int32)})
    with pytest.raises(UserError, match=r"weight_zero_point has no place in mlx-lm's llama"):
        loaded(folder)
    with pytest.raises(ValueError, match="parameters not in model"):
        load_model(folder)


def test_where_names_are_others_the_first_one_is_said(write_folder: Write) -> None:
    values = values_of(tiny_config("llama"))
    config = {**tiny_config("llama"), "torch_dtype": "float32"}
    folder = write_folder(config, {f"encoder.{n}": a for n, a in values.items()})
    with pytest.raises(
        UserError, match=r"is missing, expected .*; it has encoder\.\S+, which mlx-lm's llama does"
    ):
        loaded(folder)
