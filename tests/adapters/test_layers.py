"""What is put into a model and what a plan says of it: the same tensors, and the targets a recipe names."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from support.stepping import weights_of
from support.tiny_models import FAMILIES, OTHER_FAMILIES, tiny_config
from support.tuning import EXPERTS, LINEAR, SEED, HeldWeights, TunedCase, built_of, reference_model

from mlx_empire.adapters.initial import initial_adapter
from mlx_empire.checkpoint.tuned_source import TunedSource
from mlx_empire.errors import UserError
from mlx_empire.model.target import make_target
from mlx_empire.optim.adamw import AdamW
from mlx_empire.plan.cells import cell_layout
from mlx_empire.plan.describe import build_model, describe
from mlx_empire.plan.memory import ledger
from mlx_empire.plan.model import TensorSpec
from mlx_empire.plan.packing import PACKINGS
from mlx_empire.plan.shards import make_plan
from mlx_empire.plan.tuning import tuned
from mlx_empire.plan.workload import Workload
from mlx_empire.recipe.sections import TuningSection

TUNINGS = {
    "lora": {"type": "lora", "rank": 4},
    "dora": {"type": "dora"},
    "two layers": {"type": "lora", "layers": 2},
    **{f"qlora {bits}": {"type": "qlora", "bits": bits} for bits in PACKINGS},
    "embedding": {"type": "lora", "targets": ["all-linear", "embed_tokens"]},
    "packed embedding": {"type": "qlora", "targets": ["embed_tokens"]},
}


def both(family, tuning, dtype="bfloat16", **config):
    """(the model as it is built, the model as it is planned)."""
    config, section = tiny_config(family, **config), TuningSection.model_validate(tuning)
    plain = describe(build_model(config, family), config, family, dtype)
    return make_target(config, section, family, dtype).spec, tuned(plain, section)


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
def test_the_plan_lists_the_tensors_that_are_built(family, tuning):
    if "targets" in tuning and family in ("gpt2", "mamba2"):
        tuning = tuning | {"targets": [{"gpt2": "wte", "mamba2": "embeddings"}[family]]}
    built, planned = both(family, tuning)
    for one, other in zip(built.units, planned.units, strict=True):
        assert sorted(one.tensors, key=str) == sorted(other.tensors, key=str), one.name


@pytest.mark.parametrize("targets", [["o_proj"], ["self_attn.o_proj", "q_proj"]])
def test_so_it_does_with_targets(targets):
    built, planned = both("starcoder2", {"type": "dora", "targets": targets})
    for one, other in zip(built.units, planned.units, strict=True):
        assert sorted(one.tensors, key=str) == sorted(other.tensors, key=str)
    assert sum(t.trainable for t in built.units[1].tensors) == 3 * len(targets)


@pytest.mark.parametrize("kind", ["lora", "dora", "qlora"])
def test_so_it_does_with_the_head(kind):
    built, planned = both("qwen3", {"type": kind, "targets": ["lm_head", "k_proj"], "layers": 1})
    for one, other in zip(built.units, planned.units, strict=True):
        assert sorted(one.tensors, key=str) == sorted(other.tensors, key=str)
    assert [sum(t.trainable for t in u.tensors) > 0 for u in built.units] == [True, False, False, False, True]


@pytest.mark.parametrize("bits", PACKINGS)
def test_packed_parameters_are_counted_as_what_they_stand_for(bits):
    config = {"hidden_size": 128, "intermediate_size": 192}
    plain, _ = both("llama", {"type": "full"}, **config)
    built, planned = both("llama", {"type": "qlora", "bits": bits}, **config)
    for one in (built, planned):
        assert one.parameters - one.trainable_parameters == plain.parameters


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_so_it_does_with_experts(family, kind):
    built, planned = both(family, {"type": kind, "targets": ["experts", "q_proj"], "rank": 2})
    for one, other in zip(built.units, planned.units, strict=True):
        assert sorted(one.tensors, key=str) == sorted(other.tensors, key=str)


@pytest.mark.parametrize("kind", ["lora", "dora", "qlora"])
def test_the_ledger_is_the_same(kind):
    peaks = []
    for spec in both("llama", {"type": kind}, "float32"):
        work = Workload(2, 64, cell_layout(4, 2, 1, 1), 0, "float32", "auto", 8192)
        peaks.append(ledger(spec, make_plan(spec.units, [1.0], 3), work, 0, AdamW().state_bytes).peak)
    assert peaks[0] == peaks[1]


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
