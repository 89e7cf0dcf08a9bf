"""Bases that other tools packed: with mlx-lm's own loading as reference, or refused in one line by their method."""

import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model, load_model
from support.stepping import Case, config_of, weights_of

from mlx_empire.capacity import command as capacity
from mlx_empire.errors import UserError
from mlx_empire.formats.convert import packed_as_stored, plain_weights, write_packed
from mlx_empire.formats.export_folder import FolderWriter
from mlx_empire.formats.hf_folder import open_folder, stored_if_whole
from mlx_empire.formats.source import FolderSource, TunedSource
from mlx_empire.model.config import read_config
from mlx_empire.model.quantize import unpacked
from mlx_empire.model.target import make_target, planned_target
from mlx_empire.recipe.load import parse_recipe
from mlx_empire.recipe.sections import TuningSection
from mlx_empire.verify import command as verify

TOKENS = mx.array([[1, 7, 200, 31, 4, 90]])


def written(folder, tensors, config, quantised, **more):
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})
    said = {"quantization_config": quantised} if quantised else {}
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32", **said, **more}))
    return folder


def published_gpt_oss(folder):
    """As on the hub: experts in MXFP4 blocks of 16 bytes, gate and up row by row in one matrix, the rest plain."""
    case = Case("gpt_oss", config={"hidden_size": 64, "intermediate_size": 96})
    _, _, values = weights_of(case)
    tensors = {}
    for name, array in values.items():
        stem, _, leaf = name.rpartition(".")
        owner, _, projection = stem.rpartition(".")
        if not owner.endswith(".experts"):
            tensors[name] = array
        elif projection == "up_proj":
            continue
        else:
            pair = [array] if projection == "down_proj" else [array, values[f"{owner}.up_proj.{leaf}"]]
            shape = (array.shape[0], len(pair) * array.shape[1], *array.shape[2:])
            array = mx.stack(pair, axis=2).reshape(shape)
            name = f"{owner}.{projection.replace('gate', 'gate_up')}"
            if leaf == "bias":
                tensors[f"{name}_bias"] = array
            else:
                codes, scales = mx.quantize(array, 32, 4, mode="mxfp4")
                tensors[f"{name}_blocks"] = codes.view(mx.uint8).reshape(*scales.shape, 16)
                tensors[f"{name}_scales"] = scales
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    how = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    return written(folder, tensors, config_of(case), how)


def compressed_deepseek(folder):
    """compressed-tensors' four bits, symmetric, in groups of 32: int32 words beside scales and shapes."""
    case = Case("deepseek_v3")
    _, _, values = weights_of(case)
    tensors = {}
    for name, array in values.items():
        stem = name.removesuffix(".weight")
        if ".mlp." not in name or array.ndim != 2 or name.endswith("gate.weight") or array.shape[1] % 32:
            tensors[name] = array
            continue
        scales = mx.abs(array.reshape(array.shape[0], -1, 32)).max(-1) / 7
        codes = mx.clip(mx.round(array / mx.repeat(scales, 32, 1)), -8, 7) + 8
        words = codes.astype(mx.uint32).reshape(array.shape[0], -1, 8) << mx.arange(0, 32, 4, dtype=mx.uint32)
        tensors |= {
            f"{stem}.weight_packed": words.sum(-1).astype(mx.uint32).view(mx.int32),
            f"{stem}.weight_scale": scales,
            f"{stem}.weight_shape": mx.array(array.shape),
        }
    assert any(name.endswith("_packed") for name in tensors)
    return written(
        folder, tensors, config_of(case), {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    )


def unnamed_bits(folder):
    """mlx-lm's own folder with modules of other bits and groups than `quantization` says, and no word about them."""
    case = Case("llama", config={"intermediate_size": 128})
    model, _, values = weights_of(case)
    model.load_weights(list(values.items()))

    def settings(path, module):
        if not hasattr(module, "to_quantized"):
            return False
        return {"group_size": 32, "bits": 8} if path.endswith(("v_proj", "embed_tokens")) else True

    nn.quantize(model, 64, 4, class_predicate=settings)
    tensors = dict(tree_flatten(model.parameters()))
    return written(folder, tensors, config_of(case), None, quantization={"group_size": 64, "bits": 4})


FOLDERS = {
    "published gpt-oss": published_gpt_oss,
    "compressed-tensors": compressed_deepseek,
    "unnamed": unnamed_bits,
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_adapters_start_at_the_logits_of_mlx_lms_own_loading(kind, tmp_path):
    """Bit for bit, and the packed weights stay packed."""
    folder = FOLDERS[kind](tmp_path / "base")
    theirs, _ = load_model(folder)
    config, stored = read_config(folder), open_folder(folder).stored()
    built = make_target(config, TuningSection(type="lora"), str(folder), "float32", stored)
    source = TunedSource(FolderSource(folder, built.rebuild, built.base), built.spec, 0, built.packing)
    built.model.load_weights([(t.name, a) for i in range(len(built.spec.units)) for t, a in source.unit(i)])
    built.model.eval()
    assert mx.array_equal(built.model(TOKENS), theirs(TOKENS))
    expected = {n: a.shape for n, a in tree_flatten(theirs.parameters()) if a.dtype == mx.uint32}
    frozen = {t.name.replace(".linear.", "."): t.shape for u in built.spec.units for t in u.tensors if t.bits}
    assert frozen == expected
    assert expected


@pytest.mark.parametrize("kind", FOLDERS)
def test_unpacked_its_weights_are_those_of_mlx_lms_own_unpacking(kind, tmp_path):
    folder = FOLDERS[kind](tmp_path / "base")
    theirs = dict(tree_flatten(dequantize_model(load_model(folder)[0]).parameters()))
    config = unpacked(read_config(folder))
    plain = make_target(config, TuningSection(), str(folder), "float32", open_folder(folder).stored())
    source = plain_weights(folder, plain)
    ours = {t.name: a for i in range(len(plain.spec.units)) for t, a in source.unit(i)}
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], array.astype(mx.float32)) for name, array in theirs.items())
    write_packed(tmp_path / "again", source, plain.spec, packed_as_stored(folder, plain), folder)
    before, after = (
        {n: (a.shape, a.dtype) for n, a in tree_flatten(load_model(path)[0].parameters())}
        for path in (folder, tmp_path / "again")
    )
    assert after == before


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_plan_counts_what_the_run_packs(kind, tmp_path):
    folder = FOLDERS[kind](tmp_path / "base")
    stored = open_folder(folder).stored()
    run = make_target(read_config(folder), TuningSection(type="lora"), str(folder), "float32", stored)
    planned = planned_target(recipe(folder, "tuning.type=lora"), stored_if_whole)
    assert planned.spec == run.spec


def test_without_its_weights_the_plan_packs_what_the_publisher_says(tmp_path):
    folder = published_gpt_oss(tmp_path / "base")
    run = planned_target(recipe(folder, "tuning.type=lora"), stored_if_whole)
    (folder / "model.safetensors").unlink()
    assert planned_target(recipe(folder, "tuning.type=lora"), stored_if_whole).spec == run.spec


def text_of(folder):
    return f"""
model: {{path: {folder}, dtype: float32}}
data: {{path: rows.jsonl, sequence_length: 64}}
batch: {{global_size: 1}}
optimizer: {{learning_rate: 1.0e-3}}
run: {{dir: run, steps: 1}}
"""


def recipe(folder, *overrides):
    return parse_recipe(text_of(folder), "a test's", list(overrides))


Z = mx.zeros
REFUSED = {
    "AWQ": ({"quant_method": "awq", "bits": 4}, {".qweight": (Z, mx.int32), ".qzeros": (Z, mx.int32)}),
    "GPTQ": ({"quant_method": "gptq", "bits": 4}, {".qweight": (Z, mx.int32), ".g_idx": (Z, mx.int32)}),
    "bitsandbytes": (
        {"load_in_4bit": True},
        {".weight": (Z, mx.uint8), ".weight.quant_map": (Z, mx.float32)},
    ),
    "HQQ": ({"quant_method": "hqq"}, {".W_q": (Z, mx.uint8)}),
    "torchao": ({"quant_method": "torchao"}, {".weight": (Z, mx.int8)}),
    "FP8": ({"quant_method": "fp8"}, {".weight": (Z, mx.uint8), ".weight_scale_inv": (Z, mx.float32)}),
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {".weight": (Z, mx.uint8), ".weight_scale": (Z, mx.uint8), ".weight_scale_2": (Z, mx.float32)},
    ),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {".weight_packed": (Z, mx.int32), ".weight_scale": (Z, mx.float32), ".weight_shape": (Z, mx.int64)},
    ),
}


def foreign_folder(path, quantised, leaves):
    """A llama whose projections are stored as another tool's tensors; only their names and dtypes are true."""
    _, _, values = weights_of(Case("llama"))
    tensors = {}
    for name, array in values.items():
        if name.endswith("_proj.weight"):
            stem = name.removesuffix(".weight")
            tensors |= {f"{stem}{leaf}": make(array.shape, dtype) for leaf, (make, dtype) in leaves.items()}
        else:
            tensors[name] = array
    return written(path, tensors, config_of(Case("llama")), quantised)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("method", REFUSED)
def test_other_methods_are_named_in_one_line_to_the_run_and_to_the_plan(method, tuning, tmp_path):
    quantised, leaves = REFUSED[method]
    folder = foreign_folder(tmp_path / "base", quantised, leaves)
    config, stored = read_config(folder), open_folder(folder).stored()
    said = set()
    for ask in (
        lambda: make_target(config, TuningSection(type=tuning), str(folder), "float32", stored),
        lambda: planned_target(recipe(folder, f"tuning.type={tuning}"), stored_if_whole),
    ):
        with pytest.raises(UserError) as error:
            ask()
        said.add(str(error.value))
    (line,) = said
    assert f"quantised by {method}" in line or f"quantised ({method})" in line
    assert "the folder that it was made from" in line or "the one it was made from" in line
    assert "\n" not in line


@pytest.mark.parametrize("command", [capacity.main, verify.main], ids=["capacity", "verify"])
def test_commands_say_it_in_one_line(command, tmp_path, capsys):
    folder = foreign_folder(tmp_path / "base", *REFUSED["AWQ"])
    (tmp_path / "recipe.yaml").write_text(text_of(folder) + "tuning: {type: lora}\n")
    with pytest.raises(SystemExit) as ended:
        command([str(tmp_path / "recipe.yaml")])
    assert ended.value.code == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert "quantised by AWQ" in line


@pytest.mark.parametrize("method", ["AWQ", "GPTQ", "bitsandbytes", "FP8", "compressed-tensors"])
def test_where_the_configuration_is_silent_the_tensors_name_the_method(method, tmp_path):
    folder = foreign_folder(tmp_path / "base", None, REFUSED[method][1])
    with pytest.raises(UserError, match=f"quantised by {method}"):
        planned_target(recipe(folder, "tuning.type=lora"), stored_if_whole)


def test_modelopts_own_file_counts(tmp_path):
    folder = foreign_folder(tmp_path / "base", None, REFUSED["HQQ"][1])
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    with pytest.raises(UserError, match="quantised by FP8"):
        planned_target(recipe(folder, "tuning.type=lora"), stored_if_whole)


def test_fp8_that_mlx_lm_takes_back_is_no_packed_base(tmp_path):
    """deepseek_v3's blocks become bfloat16 while they are loaded: for full tuning and for adapters."""
    case = Case("deepseek_v3")
    _, _, values = weights_of(case)
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors = values | {name: mx.to_fp8(values[name]), f"{name}_scale_inv": mx.ones((1, 1))}
    folder = written(tmp_path / "base", tensors, config_of(case), {"quant_method": "fp8"})
    for tuning in ("full", "lora"):
        stored = open_folder(folder).stored()
        built = make_target(read_config(folder), TuningSection(type=tuning), str(folder), "float32", stored)
        assert not any(t.bits for u in built.spec.units for t in u.tensors)
    trained = make_target(read_config(folder), TuningSection(), str(folder), "float32", stored)
    source = FolderSource(folder, trained.rebuild, trained.spec)
    with FolderWriter(tmp_path / "out", trained.spec, trained.rebuild, folder) as writer:
        for index in range(len(trained.spec.units)):
            writer.write_unit(index, {tensor.name: array for tensor, array in source.unit(index)})
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    before, after = load_model(folder)[0], load_model(tmp_path / "out")[0]
    assert mx.allclose(before(TOKENS), after(TOKENS), atol=1e-5)


@pytest.mark.parametrize("codes", [{"num_bits": 8}, {"symmetric": False}, {"actorder": "group"}])
def test_codes_that_mlx_lm_would_take_for_others_are_refused(codes, tmp_path):
    """It reads compressed-tensors as symmetric codes of 4 bits in the order of the inputs, whatever is said of them."""
    folder = compressed_deepseek(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    weights = {"num_bits": 4, "symmetric": True, "type": "int", "strategy": "group", "group_size": 32}
    for said, refused in ((weights, False), ({**weights, **codes}, True)):
        config["quantization_config"]["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": said}}
        (folder / "config.json").write_text(json.dumps(config))
        try:
            planned_target(recipe(folder, "tuning.type=lora"), stored_if_whole)
            line = ""
        except UserError as error:
            line = str(error)
        assert ("quantised by compressed-tensors" in line) is refused


def test_a_tensor_that_mlx_lms_own_packed_folder_lacks_is_named(tmp_path):
    folder = unnamed_bits(tmp_path / "base")
    tensors = mx.load(str(folder / "model.safetensors"))
    tensors.pop("model.norm.weight")
    config = json.loads((folder / "config.json").read_text())
    written(folder, tensors, config, config["quantization"])
    built = make_target(
        read_config(folder), TuningSection(type="lora"), "f", "float32", open_folder(folder).stored()
    )
    with pytest.raises(UserError, match=r"tensor model\.norm\.weight is missing"):
        FolderSource(folder, built.rebuild, built.base)
