"""What is put into a model and what a plan says of it: the same tensors, and the targets a recipe names."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from support.stepping import weights_of
from support.tiny_models import FAMILIES, OTHER_FAMILIES, tiny_config
from support.tuning import EXPERTS, LINEAR, SEED, HeldWeights, TunedCase, built_of, reference_model

from mlx_empire.errors import UserError
from mlx_empire.formats.source import TunedSource
from mlx_empire.model.build import build_model, describe
from mlx_empire.model.lora import initial_adapter
from mlx_empire.model.quantize import QUANT_FORMATS
from mlx_empire.model.spec import TensorSpec
from mlx_empire.model.target import make_target
from mlx_empire.recipe.sections import TuningSection

TUNINGS = {
    "lora": {"type": "lora", "rank": 4},
    "dora": {"type": "dora"},
    "two layers": {"type": "lora", "layers": 2},
    **{f"qlora {bits}": {"type": "qlora", "bits": bits} for bits in QUANT_FORMATS},
    "embedding": {"type": "lora", "targets": ["all-linear", "embed_tokens"]},
    "packed embedding": {"type": "qlora", "targets": ["embed_tokens"]},
}


def tuned(family, tuning, dtype="bfloat16", **config):
    """(the plain model, the model as it is tuned)."""
    config, section = tiny_config(family, **config), TuningSection.model_validate(tuning)
    plain = describe(build_model(config, family), config, family, dtype)
    return plain, make_target(config, section, family, dtype).spec


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
def test_the_base_is_still_there_frozen_and_all_that_trains_is_adapters(family, tuning):
    if "targets" in tuning and family in ("gpt2", "mamba2"):
        tuning = tuning | {"targets": [{"gpt2": "wte", "mamba2": "embeddings"}[family]]}
    plain, built = tuned(family, tuning)
    assert built.base_parameters == plain.parameters
    for one, other in zip(built.units, plain.units, strict=True):
        adapters = [t for t in one.tensors if t.trainable]
        assert {t.name.rpartition(".")[2] for t in adapters} <= {"lora_a", "lora_b", "m"}
        assert {t.dtype for t in adapters} <= {"float32"}
        base = {
            t.name.replace(".linear.", ".").replace(".embedding.", ".")
            for t in one.tensors
            if not t.trainable
        }
        assert base >= {t.name for t in other.tensors}
    assert built.trainable_parameters > 0


@pytest.mark.parametrize("targets", [["o_proj"], ["self_attn.o_proj", "q_proj"]])
def test_a_target_gets_an_adapter_in_every_layer(targets):
    _, built = tuned("starcoder2", {"type": "dora", "targets": targets})
    assert {sum(t.trainable for t in u.tensors) for u in built.units[1:]} == {3 * len(targets)}


@pytest.mark.parametrize("kind", ["lora", "dora", "qlora"])
def test_the_head_gets_one_where_it_is_named(kind):
    _, built = tuned("qwen3", {"type": kind, "targets": ["lm_head", "k_proj"], "layers": 1})
    assert [sum(t.trainable for t in u.tensors) > 0 for u in built.units] == [True, False, False, False, True]


@pytest.mark.parametrize("bits", QUANT_FORMATS)
def test_packed_parameters_are_counted_as_what_they_stand_for(bits):
    config = {"hidden_size": 128, "intermediate_size": 192}
    plain, built = tuned("llama", {"type": "qlora", "bits": bits}, **config)
    assert built.parameters - built.trainable_parameters == plain.parameters


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_stacked_experts_get_adapters_that_are_stacked_alike(family, kind):
    _, built = tuned(family, {"type": kind, "targets": ["experts"], "rank": 2})
    names = {t.name: t.shape for u in built.units for t in u.tensors if t.trainable}
    assert {n.rpartition(".")[0].partition("layers.")[2].partition(".")[2] for n in names} == set(
        EXPERTS[family]
    )
    assert all(len(shape) == 3 and 2 in shape[1:] for shape in names.values())


@pytest.mark.parametrize("family", LINEAR)
def test_all_linear_means_every_linear_layer_but_routers_and_experts(family):
    assert set(built_of(TunedCase(family)).adapters.keys) == set(LINEAR[family])


def test_settings_are_mlx_lms():
    found = built_of(
        TunedCase("llama", tuning={"type": "dora", "rank": 4, "alpha": 10, "layers": 3})
    ).adapters
    assert found.config() == {
        "fine_tune_type": "dora",
        "num_layers": 3,
        "lora_parameters": {"rank": 4, "scale": 2.5, "dropout": 0.0, "keys": list(found.keys)},
    }
    assert built_of(TunedCase("llama", tuning={"type": "lora", "rank": 32})).adapters.scale == 2.0


def test_rslora_divides_by_the_root_of_the_rank():
    tuning = {"type": "lora", "rank": 16, "rslora": True}
    assert built_of(TunedCase("llama", tuning=tuning)).adapters.scale == 32 / 4
    assert built_of(TunedCase("llama", tuning=tuning | {"alpha": 6})).adapters.scale == 6 / 4


@pytest.mark.parametrize(
    ("family", "tuning", "message"),
    [
        ("llama", {"type": "lora", "layers": 5}, "tuning.layers: 5: the model has 4 layers"),
        ("llama", {"type": "lora", "targets": ["q_prj"]}, "q_prj: no linear module .*down_proj.*q_proj"),
        ("llama", {"type": "lora", "targets": ["experts"]}, "tuning.targets: experts"),
        ("qwen3_moe", {"type": "lora", "targets": ["gate"]}, "there are embed_tokens, experts, k_proj"),
        ("llama", {"type": "dora", "targets": ["embed_tokens"]}, "no DoRA for embeddings"),
        ("qwen3_moe", {"type": "dora", "targets": ["experts"]}, "no DoRA for stacked experts"),
    ],
)
def test_what_the_model_does_not_have_is_refused_in_one_line(family, tuning, message):
    with pytest.raises(UserError, match=message) as error:
        built_of(TunedCase(family, tuning=tuning))
    assert "\n" not in str(error.value)


# ---- first values


def test_lora_a_is_a_function_of_seed_and_name_and_spread_as_mlx_lms():
    tensor = TensorSpec("model.layers.0.self_attn.q_proj.lora_a", (256, 64), "float32")
    other = TensorSpec("model.layers.1.self_attn.q_proj.lora_a", (256, 64), "float32")
    values = initial_adapter(tensor, 1)
    mx.random.seed(5)
    assert mx.array_equal(values, initial_adapter(tensor, 1))
    assert not mx.array_equal(values, initial_adapter(other, 1))
    assert not mx.array_equal(values, initial_adapter(tensor, 2))
    assert abs(values.max().item() - 1 / 16) < 1e-4
    assert abs(values.mean().item()) < 1e-3
    assert values.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.02)


@pytest.mark.parametrize(
    "case",
    [
        TunedCase("llama", tied=True, tuning={"type": "dora"}),
        TunedCase("llama", tuning={"type": "qlora"}),
        TunedCase("qwen3_moe", tuning={"type": "qlora", "bits": 8}),
        TunedCase("llama4", tuning={"type": "qlora", "bits": 3}),
        TunedCase("llama", tuning={"type": "qlora", "bits": "mxfp4"}),
        TunedCase("llama", tied=True, tuning={"type": "qlora", "bits": "nvfp4"}),
        TunedCase(
            "qwen3_moe", tuning={"type": "qlora", "bits": "mxfp8"}, config={"moe_intermediate_size": 64}
        ),
    ],
    ids=lambda case: f"{case.family} {case.tuning['type']} {case.tuning.get('bits')}",
)
def test_what_is_loaded_is_what_mlx_lm_makes_of_the_weights(case):
    """Names, packed codes, scales and magnitudes, bit for bit; `lora_a` is ours, `lora_b` zero."""
    built = built_of(case)
    source = TunedSource(HeldWeights(built.base, weights_of(case)[2]), built.spec, SEED, built.packing)
    found = {t.name: a for i in range(len(built.spec.units)) for t, a in source.unit(i)}
    expected = dict(tree_flatten(reference_model(case).parameters()))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        if not name.endswith(".lora_a"):
            assert mx.array_equal(found[name], array), name
