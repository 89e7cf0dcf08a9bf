"""A base that its folder stores quantised, as `mlx_lm.convert -q` writes it: read as it is, or refused."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from support.stepping import batches_of, config_of, counted_tokens, weights_of, whole_weights
from support.tuning import LINEAR, TunedCase, textbook_steps, trainable, tuned_trainer

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.errors import UserError
from mlx_empire.formats.hf_folder import open_folder
from mlx_empire.formats.source import FolderSource, TunedSource
from mlx_empire.model.target import make_target, planned_target
from mlx_empire.recipe.load import parse_recipe
from mlx_empire.recipe.sections import TuningSection


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def folder(request, tmp_path_factory):
    """Four bits, one module in eight, a group of 32; beside it the tensors that it holds."""
    case = TunedCase(request.param, config={"moe_intermediate_size": 64})
    model, _, values = weights_of(case)
    model.load_weights(list(values.items()))
    own = {"group_size": 64, "bits": 8}
    odd = "model.layers.0.self_attn.q_proj"

    def settings(path, module):
        if not hasattr(module, "to_quantized") or path.endswith(".gate"):
            return False
        return own if path == odd else True

    nn.quantize(model, 32, 4, class_predicate=settings)
    path = tmp_path_factory.mktemp(request.param)
    save_model(path, model)
    config = config_of(case) | {"quantization": {"group_size": 32, "bits": 4, odd: own}}
    (path / "config.json").write_text(json.dumps(config))
    return path, config, dict(tree_flatten(model.parameters()))


@pytest.fixture(scope="module", params=["llama mxfp4", "qwen3_moe mxfp4", "llama mxfp8", "qwen3_moe nvfp4"])
def floating(request, tmp_path_factory):
    """A folder in one of MLX's floating-point formats, made by mlx-lm: a mixture's router is in 8 bits, affine."""
    family, mode = request.param.split()
    case = TunedCase(family, config={"moe_intermediate_size": 64})
    model, _, values = weights_of(case)
    model.load_weights(list(values.items()))
    model, config = quantize_model(model, config_of(case), None, None, mode)
    path = tmp_path_factory.mktemp(mode)
    save_model(path, model)
    save_config(dict(config), path / "config.json")
    return path, json.loads((path / "config.json").read_text()), dict(tree_flatten(model.parameters()))


def test_packed_weights_are_read_as_they_are(folder):
    check_reading(*folder)


def test_floating_point_codes_are_read_as_they_are(floating):
    path, config, expected = floating
    assert {a.dtype for n, a in expected.items() if n.endswith("q_proj.scales")} == {mx.uint8}
    check_reading(path, config, expected)


def check_reading(path, config, expected):
    built = make_target(config, TuningSection(type="lora"), str(path), "float32", open_folder(path).stored())
    source = TunedSource(FolderSource(path, built.rebuild, built.base), built.spec, 0, None)
    found = {t.name: a for i in range(len(built.spec.units)) for t, a in source.unit(i)}
    base = {name.replace(".linear.", "."): a for name, a in found.items() if ".lora_" not in name}
    assert base.keys() == expected.keys()
    for name, array in expected.items():
        assert base[name].dtype == array.dtype
        assert mx.array_equal(base[name], array), name
    assert {t.name: t.shape for u in built.spec.units for t in u.tensors} == {
        n: a.shape for n, a in found.items()
    }


def test_with_its_weights_the_model_gives_mlx_lms_logits(floating):
    """Bit for bit those of mlx-lm's own loading; fresh adapters add nothing."""
    path, config, _ = floating
    built = make_target(config, TuningSection(type="qlora"), str(path), "float32", open_folder(path).stored())
    source = TunedSource(FolderSource(path, built.rebuild, built.base), built.spec, 0, None)
    built.model.load_weights([(t.name, a) for i in range(len(built.spec.units)) for t, a in source.unit(i)])
    built.model.eval()
    theirs, _ = load_model(path)
    tokens = mx.array([[1, 7, 200, 31, 4]])
    assert mx.array_equal(built.model(tokens), theirs(tokens))


def test_the_plan_counts_it_as_it_is(floating):
    path, _, expected = floating
    recipe = load_recipe_text(path)
    frozen = [t for u in planned_target(recipe).spec.units for t in u.tensors if not t.trainable]
    ours = {t.name.replace(".linear.", "."): (t.shape, t.dtype) for t in frozen}
    assert ours == {n: (a.shape, str(a.dtype).split(".")[-1]) for n, a in expected.items()}


def load_recipe_text(path):
    """The recipe of a daughter of `path`."""
    text = f"""
model: {{path: {path}, dtype: float32}}
tuning: {{type: lora}}
data: {{path: rows.jsonl, sequence_length: 64}}
batch: {{global_size: 1}}
optimizer: {{learning_rate: 1.0e-3}}
run: {{dir: run, steps: 1}}
"""
    return parse_recipe(text, "a test's")


@pytest.mark.parametrize(
    ("tuning", "changed", "message"),
    [
        ({"type": "qlora", "bits": 8}, {}, "tuning.bits: 8: .*stored in 4 bits; leave tuning.bits out"),
        ({"type": "lora"}, {"mode": "mxfp5"}, "packed as mxfp5"),
        ({"type": "qlora", "bits": 4}, {"mode": "mxfp4"}, "tuning.bits: 4: .*stored as mxfp4"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(folder, tuning, changed, message):
    path, config, _ = folder
    config = config | {"quantization": config["quantization"] | changed}
    with pytest.raises(UserError, match=message) as error:
        make_target(config, TuningSection(**tuning), str(path), "float32", open_folder(path).stored())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bits", [3, 6])
def test_dora_where_mlx_lm_takes_a_wrong_width_is_refused(bits, tmp_path):
    path, config = packed_llama(tmp_path, 64, bits, "affine")
    with pytest.raises(
        UserError, match=f"tuning.type: dora: .*_proj is stored in {bits} bits.*use type lora"
    ):
        make_target(config, TuningSection(type="dora"), str(path), "float32", open_folder(path).stored())


@pytest.mark.parametrize(
    ("group", "bits", "mode"),
    [(64, 4, "affine"), (None, None, "mxfp4"), pytest.param(32, 8, "affine", marks=pytest.mark.slow)],
)
def test_ten_steps_of_dora_are_those_of_mlx_lms_own_layers(group, bits, mode, tmp_path):
    """Magnitudes begin as the norms of what the codes stand for."""
    case = TunedCase("llama", tuning={"type": "dora", "rank": 4, "alpha": 4}, micro_batches=3, clip_norm=0.05)
    path, config = packed_llama(tmp_path, group, bits, mode)

    def given():
        target = make_target(
            config, TuningSection(**case.tuning), str(path), "float32", open_folder(path).stored()
        )
        return target, FolderSource(path, target.rebuild, target.base)

    with CommThread() as thread:
        trainer = tuned_trainer(case, SoloCommunicator("here"), thread, given())
        first = whole_weights(trainer)
        model, _ = load_model(path)
        model.freeze()
        linear_to_lora_layers(
            model, 4, {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": LINEAR["llama"]}, use_dora=True
        )
        model.train()
        for name, w in trainable(model).items():
            if name.endswith(".m"):
                assert np.array_equal(first[name], w.astype(np.float32)), name
        model.load_weights(
            [(n, mx.array(first[n]).reshape(w.shape)) for n, w in trainable(model).items()], strict=False
        )
        losses = []
        for step in range(10):
            batches = batches_of(case, step)
            tokens = counted_tokens(batches)
            losses.append(trainer.train_step(batches, tokens, step + 1, case.learning_rate).loss)
        assert losses == pytest.approx(textbook_steps(case, model, 10), rel=1e-5)
        found = whole_weights(trainer)
        for name, should in trainable(model).items():
            moved = np.linalg.norm(should - np.array(first[name], np.float64).reshape(should.shape))
            assert moved > 0
            assert np.linalg.norm(found[name].reshape(should.shape) - should) <= 0.01 * moved, name


def packed_llama(folder, group, bits, mode):
    """A tiny llama in a folder as mlx-lm packs it; its configuration."""
    case = TunedCase("llama")
    model, _, values = weights_of(case)
    model.load_weights(list(values.items()))
    model, config = quantize_model(model, config_of(case), group, bits, mode)
    save_model(folder, model)
    save_config(dict(config), folder / "config.json")
    return folder, json.loads((folder / "config.json").read_text())


def test_full_fine_tuning_of_it_is_refused(folder):
    path, config, _ = folder
    with pytest.raises(UserError, match="quantised"):
        make_target(config, TuningSection(), str(path), "float32", open_folder(path).stored())
