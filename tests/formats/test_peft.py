"""PEFT's format without torch: names, shapes and settings by its own documentation, and what is refused."""

import mlx.core as mx
import pytest
from support.tuning import TunedCase, built_of

from mlx_empire.errors import UserError
from mlx_empire.formats.peft import from_peft, no_peft_form, peft_config, peft_weights

STEM = "model.layers.1.self_attn.q_proj"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", "modules_to_save": None}


def theirs(stem=STEM, rank=2, inputs=64, outputs=64):
    name = f"base_model.model.{stem}"
    return {
        f"{name}.lora_A.weight": mx.random.normal((rank, inputs)),
        f"{name}.lora_B.weight": mx.random.normal((outputs, rank)).astype(mx.float16),
    }


def weights_of(built):
    return {t.name: mx.random.normal(t.shape) for u in built.spec.units for t in u.tensors if t.trainable}


@pytest.mark.parametrize(
    ("tuning", "modules"),
    [
        ({"targets": ["q_proj", "v_proj"]}, ["q_proj", "v_proj"]),
        ({"targets": ["q_proj"], "layers": 1}, ["model.layers.3.self_attn.q_proj"]),
        ({"targets": ["lm_head"]}, ["lm_head"]),
    ],
)
def test_target_modules_mean_exactly_the_adapted_ones(tuning, modules):
    built = built_of(TunedCase("llama", tuning={"type": "lora", **tuning}))
    config = peft_config(built.adapters, weights_of(built), built.spec, "base")
    assert config["target_modules"] == modules
    assert config["lora_alpha"] / config["r"] == built.adapters.scale


def test_there_and_back_again():
    case = TunedCase(
        "llama", tuning={"type": "dora", "rank": 4, "targets": ["q_proj", "down_proj", "lm_head"]}
    )
    built = built_of(case)
    weights = weights_of(built)
    config = peft_config(built.adapters, weights, built.spec, "base")
    settings, found = from_peft(config, peft_weights(weights, built.spec), built.base, "here")
    assert (settings.rank, settings.scale, settings.dora, settings.layers) == (4, 2.0, True, 4)
    assert set(settings.keys) == {"self_attn.q_proj", "mlp.down_proj", "lm_head"}
    assert found.keys() == weights.keys()
    assert all(mx.array_equal(found[name], array) for name, array in weights.items())


def test_layers_left_out_get_zeros_and_values_are_transposed_to_float32():
    base = built_of(TunedCase("llama")).base
    tensors = theirs()
    settings, found = from_peft({**CONFIG, "use_rslora": True}, tensors, base, "here")
    assert settings.layers == 3
    assert settings.scale == pytest.approx(6 / 2**0.5)
    b = tensors[f"base_model.model.{STEM}.lora_B.weight"]
    assert mx.array_equal(found[f"{STEM}.lora_b"], b.T.astype(mx.float32))
    assert found[f"{STEM}.lora_b"].dtype == mx.float32
    for layer in (2, 3):
        other = STEM.replace(".1.", f".{layer}.")
        assert not found[f"{other}.lora_b"].any()
    assert len(found) == 6


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"peft_type": "IA3"}, theirs(), "peft_type IA3; only LORA"),
        ({"modules_to_save": ["lm_head"]}, theirs(), "uses modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, theirs(), "uses rank_pattern"),
        ({"bias": "all"}, theirs(), "uses bias"),
        ({"r": "four"}, theirs(), "must be numbers"),
        ({}, theirs(STEM.replace("q_proj", "w_proj")), "adapts .*w_proj, which llama does not have"),
        ({"r": 3}, theirs(), r"is \(64, 2\), expected \(64, 3\)"),
        ({}, theirs(inputs=32), r"is \(32, 2\), expected \(64, 2\)"),
        ({"use_dora": True}, theirs(), "some layers only"),
        ({}, {"base_model.model.lm_head.weight": mx.zeros((2, 2))}, "no part of a LoRA adapter"),
        ({}, {}, "no adapter's tensors"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_one_line(config, tensors, message):
    base = built_of(TunedCase("llama")).base
    with pytest.raises(UserError, match=message) as error:
        from_peft({**CONFIG, **config}, tensors, base, "here")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("case", "huggingface", "why"),
    [
        (TunedCase("llama"), True, None),
        (TunedCase("llama"), False, "otherwise than Hugging Face"),
        (TunedCase("qwen3_moe", tuning={"type": "lora", "targets": ["experts"]}), True, "stacked experts"),
        (TunedCase("qwen3_moe"), True, None),
        (TunedCase("llama", tied=True, tuning={"type": "lora", "targets": ["embed_tokens"]}), True, "tied"),
        (TunedCase("llama", tuning={"type": "lora", "targets": ["embed_tokens"]}), True, None),
    ],
)
def test_what_has_no_form_in_peft_is_said(case, huggingface, why):
    found = no_peft_form(built_of(case).spec, huggingface=huggingface)
    assert (found is None) if why is None else (why in found)
