"""Adapters and quantised bases as tensors, against arithmetic by hand and against MLX's own packing."""

import mlx.core as mx
import pytest
from support.tiny_models import tiny_config

from mlx_empire.model.build import build_model, describe
from mlx_empire.model.closed_forms import experts
from mlx_empire.model.spec import ITEM_BYTES
from mlx_empire.model.target import make_target
from mlx_empire.recipe.sections import TuningSection

PLANNED = {"planned": True}


def tune(family, dtype="bfloat16", **settings):
    config = tiny_config(family, hidden_size=128, intermediate_size=192)
    spec = describe(build_model(config, family), config, family, dtype)
    tuning = TuningSection.model_validate(settings, context=PLANNED)
    return spec, make_target(config, tuning, family, dtype).spec


def test_full_tuning_changes_nothing():
    spec, after = tune("llama")
    assert after == spec


def test_lora_adds_two_small_matrices_to_every_matrix_of_a_layer():
    spec, after = tune("llama", type="lora", rank=4)
    matrices = [t for u in spec.units[1:] for t in u.tensors if len(t.shape) == 2]
    assert after.trainable_parameters == sum(4 * sum(t.shape) for t in matrices)
    assert after.parameters - after.trainable_parameters == spec.parameters
    assert {t.dtype for u in after.units for t in u.tensors if t.trainable} == {"float32"}


def test_dora_adds_a_magnitude_for_each_output():
    _, lora = tune("llama", type="lora", rank=4)
    spec, dora = tune("llama", type="dora", rank=4)
    outputs = sum(t.shape[0] for u in spec.units[1:] for t in u.tensors if len(t.shape) == 2)
    assert dora.trainable_parameters - lora.trainable_parameters == outputs


def test_targets_layers_and_experts():
    spec, after = tune("qwen3_moe", type="lora", rank=2, targets=["q_proj", "experts"], layers=1)
    total, _ = experts(spec.text_config)
    touched = {t.name for u in after.units for t in u.tensors if t.trainable}
    last = spec.units[-1].name
    assert all(name.startswith(last) for name in touched)
    assert f"{last}.self_attn.q_proj.lora_a" in touched
    assert not any("k_proj" in name or ".gate.lora" in name for name in touched)
    stacked = [t for t in after.units[-1].tensors if t.trainable and len(t.shape) == 3]
    assert len(stacked) == 6
    assert {t.shape[0] for t in stacked} == {total}


@pytest.mark.parametrize("bits", [8, 4, 2, "ternary", "mxfp4", "mxfp8", "nvfp4"])
def test_a_quantised_base_weighs_what_mlx_makes_of_it(bits):
    spec, after = tune("llama", type="qlora", bits=bits, rank=2)
    frozen = [t for u in after.units for t in u.tensors if not t.trainable]
    expected = 0
    for tensor in (t for u in spec.units for t in u.tensors):
        array = mx.zeros(tensor.shape, mx.bfloat16)
        if len(tensor.shape) == 2 and not (bits == "ternary" and ".layers." not in tensor.name):
            how = (
                {"mode": bits}
                if str(bits).endswith(("fp4", "fp8"))
                else {"bits": 2 if bits == "ternary" else bits}
            )
            expected += sum(a.nbytes for a in mx.quantize(array, **how))
        else:
            expected += array.nbytes
    assert sum(t.size * ITEM_BYTES[t.dtype] for t in frozen) == expected
