"""Reading weights: values, order and dtypes against mlx-lm's loader; bad folders are refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest
from formats.stored import Write, all_tensors, huggingface_tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from support.tiny_models import FAMILIES, tiny_config, tiny_model

from mlx_empire.errors import UserError
from mlx_empire.formats.hf_folder import model_digest, open_folder
from mlx_empire.formats.source import FolderSource, RandomSource, stored_dtype
from mlx_empire.model.build import build_model, describe, settle


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_gives_what_mlx_lm_loads(family: str, write_folder: Write) -> None:
    folder = write_folder(tiny_config(family), huggingface_tensors(family))
    build, spec = tiny_model(family)
    reference, _ = load_model(folder)
    expected = dict(tree_flatten(reference.parameters()))
    source = FolderSource(folder, build, spec)
    for index, unit in enumerate(spec.units):
        found = list(source.unit(index))
        assert [t for t, _ in found] == list(unit.tensors)
        for tensor, array in found:
            assert mx.array_equal(array, expected.pop(tensor.name)), tensor.name
    assert not expected


def test_a_folder_may_have_more_files_than_a_process_may_open_by_default(write_folder: Write) -> None:
    """macOS allows 256; here there are fewer left than the folder has."""
    tensors = huggingface_tensors("llama")
    files = {
        f"model-{i:05d}-of-{len(tensors):05d}.safetensors": {n: t} for i, (n, t) in enumerate(tensors.items())
    }
    folder = write_folder(tiny_config("llama"), files=files)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + len(files) // 2, before[1]))
    try:
        found = open_folder(folder).load()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert all(mx.array_equal(found.pop(name), tensor) for name, tensor in tensors.items())
    assert not found


@pytest.mark.parametrize("stored", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_stored_dtype_is_cast(stored: mx.Dtype, dtype: str, write_folder: Write) -> None:
    tensors = huggingface_tensors("llama", stored)
    build, spec = tiny_model("llama", dtype)
    source = FolderSource(write_folder(tiny_config("llama"), tensors), build, spec)
    for index in range(len(spec.units)):
        for tensor, array in source.unit(index):
            assert stored_dtype(tensor) == ("float32" if tensor.kind == "small" else dtype)
            assert array.dtype == getattr(mx, stored_dtype(tensor))
            assert mx.array_equal(array, tensors[tensor.name].astype(array.dtype))


def test_units_may_be_read_twice_and_in_any_order(write_folder: Write) -> None:
    build, spec = tiny_model("llama4")
    source = FolderSource(write_folder(tiny_config("llama4"), huggingface_tensors("llama4")), build, spec)
    first = {i: {t.name: a for t, a in source.unit(i)} for i in (3, 0, 4, 1)}
    next(iter(source.unit(2)))  # abandoned half-way
    for index, tensors in first.items():
        assert all(mx.array_equal(a, tensors[t.name]) for t, a in source.unit(index))


def test_index_decides_which_files_count(write_folder: Write) -> None:
    tensors = huggingface_tensors("llama")
    names = sorted(tensors)
    parts = {"model-a.safetensors": names[:9], "model-b.safetensors": names[9:]}
    files = {file: {n: tensors[n] for n in held} for file, held in parts.items()}
    folder = write_folder(tiny_config("llama"), files=files)
    mx.save_safetensors(str(folder / "model-old.safetensors"), {n: a * 0 for n, a in tensors.items()})
    build, spec = tiny_model("llama")
    found = all_tensors(FolderSource(folder, build, spec), spec)
    assert all(mx.array_equal(found[n], tensors[n]) for n in names)


def test_links_of_a_hugging_face_cache_are_followed(write_folder: Write, tmp_path: Path) -> None:
    plain = write_folder(tiny_config("llama"), huggingface_tensors("llama"))
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(("config.json", "model.safetensors")):
        shutil.copy(plain / name, blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    build, spec = tiny_model("llama")
    assert all_tensors(FolderSource(snapshot, build, spec), spec).keys()
    assert model_digest(snapshot) == model_digest(plain)


def test_tied_head_is_not_asked_for(write_folder: Write) -> None:
    tensors = huggingface_tensors("llama")  # with a head, as some tied folders have
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    build, spec = tiny_model("llama", tie_word_embeddings=True)
    source = FolderSource(write_folder(tiny_config("llama"), tensors), build, spec)
    assert "lm_head.weight" not in all_tensors(source, spec)


@pytest.mark.parametrize("place", [0, -1])
def test_a_tied_head_that_is_stored_as_another_matrix_is_refused(write_folder: Write, place: int) -> None:
    """transformers 5 computes with the stored head, mlx-lm and older tools with the embedding."""
    tensors = huggingface_tensors("llama")
    head = mx.array(tensors["model.embed_tokens.weight"])
    head[place, place] += 1
    build, spec = tiny_model("llama", tie_word_embeddings=True)
    folder = write_folder(tiny_config("llama"), tensors | {"lm_head.weight": head})
    with pytest.raises(
        UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight, and config\.json ties"
    ):
        FolderSource(folder, build, spec)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_a_tied_head_of_another_shape_is_refused_and_one_of_another_dtype_alone_is_not(
    write_folder: Write, dtype: mx.Dtype
) -> None:
    tensors = huggingface_tensors("llama")
    build, spec = tiny_model("llama", tie_word_embeddings=True)
    head = mx.array(tensors["model.embed_tokens.weight"]).astype(dtype)
    longer = mx.concatenate([head, head[:1]])
    folder = write_folder(tiny_config("llama"), tensors | {"lm_head.weight": head})
    assert "lm_head.weight" not in all_tensors(FolderSource(folder, build, spec), spec)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors | {"lm_head.weight": longer})
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        FolderSource(folder, build, spec)


def test_settle_ties_the_head_that_a_folder_lacks(write_folder: Write) -> None:
    config = tiny_config("gemma3_text")
    tensors = huggingface_tensors("gemma3_text")
    del tensors["lm_head.weight"]
    folder = write_folder(config, tensors)
    build = partial(build_model, config, "gemma3")
    with pytest.raises(UserError, match=r"lm_head\.weight is missing"):
        FolderSource(folder, build, describe(build(), config, "gemma3", "float32"))
    model = build()
    settle(model, open_folder(folder).stored(), folder)
    spec = describe(model, config, "gemma3", "float32")
    assert all_tensors(FolderSource(folder, build, spec), spec).keys() == tensors.keys()


def broken(tensors: dict[str, mx.array], case: str) -> dict[str, mx.array]:
    name = "model.layers.2.mlp.up_proj.weight"
    changed = dict(tensors)
    if case == "missing":
        del changed[name]
    elif case == "shape":
        changed[name] = mx.zeros((96, 32))
    else:
        changed[name] = mx.zeros((96, 64), mx.int32)
    return changed


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("missing", r"layers\.2\.mlp\.up_proj\.weight is missing, expected shape \(96, 64\)"),
        ("shape", r"has shape \(96, 32\), expected \(96, 64\)"),
        ("dtype", "is int32, expected float32"),
    ],
)
def test_wrong_tensor_is_named(case: str, words: str, write_folder: Write) -> None:
    build, spec = tiny_model("llama")
    folder = write_folder(tiny_config("llama"), broken(huggingface_tensors("llama"), case))
    with pytest.raises(UserError, match=words) as caught:
        FolderSource(folder, build, spec)
    assert str(folder) in str(caught.value)


def test_a_tensor_that_the_model_lacks_is_refused_as_mlx_lm_does(write_folder: Write) -> None:
    """A bias that the configuration does not ask for, or a module of another family."""
    build, spec = tiny_model("llama")
    tensors = {**huggingface_tensors("llama"), "model.layers.0.self_attn.q_proj.bias": mx.zeros((64,))}
    folder = write_folder(tiny_config("llama"), tensors)
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj\.bias has no place in mlx-lm's llama"):
        FolderSource(folder, build, spec)
    with pytest.raises(ValueError, match="parameters not in model"):
        load_model(folder)


def test_constants_of_older_folders_are_left_out(write_folder: Write) -> None:
    build, spec = tiny_model("llama")
    tensors = {**huggingface_tensors("llama"), "model.layers.0.self_attn.rotary_emb.inv_freq": mx.zeros((8,))}
    assert FolderSource(write_folder(tiny_config("llama"), tensors), build, spec)


def test_incomplete_experts_are_a_user_error(write_folder: Write) -> None:
    build, spec = tiny_model("qwen3_moe")
    tensors = huggingface_tensors("qwen3_moe")
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    with pytest.raises(UserError, match="cannot map its tensors"):
        FolderSource(write_folder(tiny_config("qwen3_moe"), tensors), build, spec)


MAPS = st.dictionaries(st.text(), st.text()).map(lambda d: json.dumps({"weight_map": d}).encode())
BAD_INDEXES = {
    "no json": b"{",
    "a list": b"[]",
    "no map": b"{}",
    "empty map": b'{"weight_map": {}}',
    "parent": b'{"weight_map": {"a": "../model.safetensors"}}',
    "absolute": b'{"weight_map": {"a": "/etc/model.safetensors"}}',
    "folder": b'{"weight_map": {"a": "x/model.safetensors"}}',
    "backslash": b'{"weight_map": {"a": "x\\\\model.safetensors"}}',
    "dots": b'{"weight_map": {"a": ".."}}',
    "null byte": b'{"weight_map": {"a": "x\\u0000.safetensors"}}',
    "pickle": b'{"weight_map": {"a": "pytorch_model.bin"}}',
    "number": b'{"weight_map": {"a": 3}}',
    "absent file": b'{"weight_map": {"a": "model-9.safetensors"}}',
    "absent tensor": b'{"weight_map": {"a": "model.safetensors"}}',
    "deep": b'{"weight_map":' + b"[" * 100_000,
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_bad_index_is_a_user_error(case: str, write_folder: Write) -> None:
    folder = write_folder(tiny_config("llama"), {"model.norm.weight": mx.zeros((2,))})
    (folder / "model.safetensors.index.json").write_bytes(BAD_INDEXES[case])
    with pytest.raises(UserError):
        open_folder(folder)


@settings(max_examples=100, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=100) | MAPS)
def test_any_bytes_as_index(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(UserError):
        open_folder(tmp_path)


@settings(max_examples=60, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_a_changed_byte_of_the_header_is_harmless(position: int, value: int, tmp_path: Path) -> None:
    """Whatever one byte of the header becomes: a folder that can be used, or a user error."""
    folder = tmp_path / "source"
    build, spec = tiny_model("llama", num_hidden_layers=1)
    if not folder.exists():
        folder.mkdir()
        mx.save_safetensors(str(folder / "good"), huggingface_tensors("llama", num_hidden_layers=1))
    data = bytearray((folder / "good.safetensors").read_bytes())
    data[position] = value
    (folder / "model.safetensors").write_bytes(data)
    try:
        all_tensors(FolderSource(folder, build, spec), spec)
    except UserError as error:
        line = str(error)
    else:
        line = ""
    assert "\n" not in line


def test_pickles_are_never_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(UserError, match="pickles, which are never read"):
        open_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"no model\*\.safetensors found"):
        open_folder(tmp_path)


@pytest.mark.parametrize("name", ["model-Q4_K_M.gguf", "model.onnx", "consolidated.00.safetensors"])
def test_weights_in_a_format_that_is_not_read_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"its weights are (GGUF|ONNX|named as Mistral's)"):
        open_folder(tmp_path)


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5000000000\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(UserError, match=r"model\.safetensors: a pointer of Git LFS.*git lfs pull"):
        open_folder(tmp_path)


def test_a_tensor_in_two_files_is_refused(write_folder: Write) -> None:
    folder = write_folder(tiny_config("llama"), {"a": mx.zeros((2,))})
    mx.save_safetensors(str(folder / "model-2.safetensors"), {"a": mx.ones((2,))})
    with pytest.raises(UserError, match="stands in"):
        open_folder(folder)


def test_digest_tells_folders_apart(write_folder: Write) -> None:
    tensors = {"a": mx.zeros((4,)), "b": mx.zeros((4,))}
    folders = [
        write_folder({"x": 1}, tensors, name="one"),
        write_folder({"x": 1}, tensors, name="same"),
        write_folder({"x": 2}, tensors, name="config"),
        write_folder({"x": 1}, {"a": mx.zeros((5,)), "b": mx.zeros((3,))}, name="shapes"),
        write_folder({"x": 1}, {"a": tensors["a"], "c": tensors["b"]}, name="names"),
    ]
    one, same, *others = [model_digest(folder) for folder in folders]
    assert one == same
    assert len({one, *others}) == 4
    assert model_digest(folders[0], contents=True) == model_digest(folders[1], contents=True)
    file = folders[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert model_digest(folders[1]) == one, "weights are not read unless asked for"
    assert model_digest(folders[0], contents=True) != model_digest(folders[1], contents=True)


def test_random_weights_depend_on_model_and_seed_only() -> None:
    build, spec = tiny_model("qwen3_moe")
    reference = all_tensors(RandomSource(build, spec, seed=7), spec)
    mx.random.seed(123)
    source = RandomSource(build, spec, seed=7)
    mx.eval(mx.random.normal((10,)))  # other users of the generator do not matter
    for index in (4, 2, 0, 2):
        assert all(mx.array_equal(a, reference[t.name]) for t, a in source.unit(index))
    other = all_tensors(RandomSource(build, spec, seed=8), spec)
    assert not mx.array_equal(other["lm_head.weight"], reference["lm_head.weight"])
    model = build_seeded(build, 7)
    assert all(mx.array_equal(a, reference[n]) for n, a in tree_flatten(model.parameters()))


def build_seeded(build: Callable[[], object], seed: int) -> object:
    mx.random.seed(seed)
    model = build()
    mx.eval(model.parameters())
    return model
