"""BitNet's packed layout, read and written, against the arithmetic of mlx-lm's Metal kernel in numpy.

mlx-lm loads the layout on a CPU and cannot compute with it there: its modules' bytes are unpacked here by that kernel's
own rule, and the reference computes with plain linear modules of those values.
"""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import bitnet
from mlx_lm.models.bitlinear_layers import BitLinear
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.utils import load_model
from support.every_model import small_config
from support.stepping import batches_of, counted_tokens, whole_weights
from support.tuning import TunedCase, textbook_steps, trainable, tuned_trainer

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine.streamable import verify_scaled_down
from mlx_empire.errors import UserError
from mlx_empire.formats.convert import plain_weights
from mlx_empire.formats.hf_folder import open_folder
from mlx_empire.formats.packing_table import PackingTable
from mlx_empire.formats.source import FolderSource
from mlx_empire.model.bitnet import as_affine, pack
from mlx_empire.model.config import read_config
from mlx_empire.model.target import make_target
from mlx_empire.recipe.sections import TuningSection

HOW = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
CONFIG = {
    "model_type": "bitnet",
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "tie_word_embeddings": True,
}


def as_the_kernel_reads(packed: np.ndarray, scale: float) -> np.ndarray:
    """mlx-lm's loop: output row + i x outputs / 4 has bits 2i and 2i + 1 of the packed row, less 1, times the scale."""
    rows = len(packed)
    found = np.zeros((4 * rows, packed.shape[1]))
    for row in range(rows):
        for i in range(4):
            found[row + i * rows] = ((packed[row] >> (2 * i)) & 3).astype(np.float64) - 1
    return found * scale


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of model_type bitnet as it is published: packed matrices with one scale each, the rest plain."""
    made = tmp_path_factory.mktemp("bitnet")
    model = bitnet.Model(bitnet.ModelArgs.from_dict(CONFIG))
    rng, tensors = np.random.default_rng(3), {}
    for name, array in tree_flatten(model.parameters()):
        if array.dtype == mx.uint8:
            digits = rng.integers(0, 3, (4, *array.shape), dtype=np.uint8)
            tensors[name] = mx.array(sum(digits[i] << (2 * i) for i in range(4)).astype(np.uint8))
        elif name.endswith("weight_scale"):
            tensors[name] = mx.array(rng.uniform(0.05, 0.2, 1).astype(np.float32))
        else:
            noise = rng.normal(size=array.shape) * (0.02 if "embed" in name else 0.1)
            tensors[name] = mx.array((noise + (0 if "embed" in name else 1)).astype(np.float32))
    mx.save_safetensors(str(made / "model.safetensors"), tensors, metadata={"format": "pt"})
    (made / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": HOW}))
    return made


def with_values(model: nn.Module) -> nn.Module:
    """mlx-lm's loaded model with plain linear modules of what its bytes stand for."""

    def plain(module: nn.Module) -> nn.Module:
        if not isinstance(module, BitLinear):
            return module
        made = nn.Linear(module.in_features, module.out_features, bias=False)
        scale = float(np.array(module.weight_scale.astype(mx.float32))[0])
        scale = 1 / scale if module.invert_weight_scales else scale
        values = as_the_kernel_reads(np.array(module.weight), scale)
        made.weight = mx.array(values.astype(np.float32))
        return made

    for layer in model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for name, module in owner.children().items():
                owner[name] = plain(module) if isinstance(module, nn.Module) else module
    return model


def base_of(folder):
    config, stored = read_config(folder), open_folder(folder).stored()
    built = make_target(config, TuningSection(type="lora", rank=4), str(folder), "float32", stored)
    return built, FolderSource(folder, built.rebuild, built.base)


def test_adapters_train_on_a_bitnet_base_as_on_its_plain_values(folder):
    """Six steps against the whole model with mlx-lm's LoRA layers; the base is packed in two bits and stays so."""
    case = TunedCase(tuning={"type": "lora", "rank": 4}, micro_batches=2, cells=1, learning_rate=1e-3)
    model = with_values(load_model(folder, lazy=True)[0])
    with CommThread() as thread:
        trainer = tuned_trainer(case, SoloCommunicator("here"), thread, base_of(folder))
        packed = [t for u in trainer.spec.units for t in u.tensors if t.bits]
        assert len(packed) == 3 * 7
        assert not any(t.trainable for t in packed)
        first = whole_weights(trainer)
        model.freeze()
        for layer in model.layers:
            for owner in (layer.self_attn, layer.mlp):
                for name, module in owner.children().items():
                    if isinstance(module, nn.Linear):
                        owner[name] = LoRALinear.from_base(module, r=4, dropout=0.0, scale=2.0)
        model.load_weights(
            [(n, mx.array(first[n]).reshape(w.shape)) for n, w in trainable(model).items()], strict=False
        )
        losses = []
        for step in range(6):
            batches = batches_of(case, step)
            total = counted_tokens(batches)
            losses.append(trainer.train_step(batches, total, step + 1, case.learning_rate).loss)
        found = whole_weights(trainer)
    assert losses == pytest.approx(textbook_steps(case, model, 6), rel=1e-5)
    for name, should in trainable(model).items():
        moved = np.linalg.norm(should - first[name].reshape(should.shape))
        assert np.linalg.norm(found[name].reshape(should.shape) - should) <= 0.02 * moved, name
    assert all(np.array_equal(found[t.name], first[t.name]) for t in packed)


def test_its_plain_weights_are_what_the_kernel_multiplies_with(folder):
    plain = make_target(CONFIG, TuningSection(), str(folder), "float32", None)
    source = plain_weights(folder, plain)
    found = {t.name: np.array(a) for i in range(len(plain.spec.units)) for t, a in source.unit(i)}
    expected = dict(tree_flatten(with_values(load_model(folder, lazy=True)[0]).parameters()))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], np.array(array)) for name, array in expected.items())


def test_a_layer_of_it_is_streamed_as_the_whole_model_is():
    """The scaled-down model that every run makes first has the whole model's loss and gradients."""
    verify_scaled_down(small_config("bitnet"), "bitnet")


@pytest.mark.parametrize(
    "changes",
    [{"linear_class": "bitlinear"}, {"quantization_mode": "online"}, {"use_rms_norm": True}],
    ids=["scales to divide by", "not packed", "normed inputs"],
)
def test_other_bitnets_are_refused(folder, tmp_path, changes):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": {**HOW, **changes}}))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(UserError, match="quantised by BitNet"):
        base_of(tmp_path)


def test_full_tuning_of_it_is_refused(folder):
    with pytest.raises(UserError, match="its weights are quantised"):
        make_target(
            read_config(folder), TuningSection(), str(folder), "float32", open_folder(folder).stored()
        )


def test_bytes_are_those_of_the_kernel():
    signs = np.random.default_rng(1).integers(-1, 2, (12, 128))
    packed = pack(mx.array(signs.astype(np.float32)))
    assert packed.shape == (3, 128)
    assert np.array_equal(as_the_kernel_reads(np.array(packed), 0.5), 0.5 * signs)
    codes, scales, biases = as_affine(packed, mx.array([0.5]))
    assert np.array_equal(np.array(mx.dequantize(codes, scales, biases, 64, 2)), 0.5 * signs)


def test_the_table_is_what_float64_says():
    rng, table = np.random.default_rng(2), PackingTable()
    pairs = [(rng.normal(size=(4, 64)), rng.normal(size=(4, 64))) for _ in range(2)]
    for n, (w, q) in enumerate(pairs):
        table.add("layers.0", f"layers.0.{n}", mx.array(w, mx.float32), mx.array(q, mx.float32), 96)
    one = table.to_json()["matrices"]["layers.0.1"]
    assert one["error"] == pytest.approx(
        np.linalg.norm(pairs[1][1] - pairs[1][0]) / np.linalg.norm(pairs[1][0])
    )
    assert one["bits"] == 3.0
    lost, whole = (
        np.sqrt(sum((a**2).sum() for a in part))
        for part in ([q - w for w, q in pairs], [w for w, _ in pairs])
    )
    layer = {"error": pytest.approx(lost / whole), "bits": 3.0, "bytes": 192, "plain_bytes": 2048}
    assert table.to_json()["layers"] == {"layers.0": layer}
