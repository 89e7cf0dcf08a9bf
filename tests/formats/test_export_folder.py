"""Exported folders: opened by mlx-lm with equal logits, complete, private, nothing dangerous inside."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from safetensors import safe_open
from support.exporting import Write, export_all, export_llama, llama_folder, logits, with_weights
from support.tiny_models import FAMILIES, MIXTURES, OTHER_FAMILIES, tiny_config, tiny_model

from mlx_empire.errors import NoRoomError, NumericsError, UserError
from mlx_empire.formats import export_folder
from mlx_empire.formats.export_folder import FolderWriter, refuse_foreign
from mlx_empire.formats.source import FolderSource, RandomSource
from mlx_empire.model.spec import ModelSpec

FIXTURES = Path(__file__).parents[1] / "fixtures"
DENSE = [f for f in FAMILIES if f not in MIXTURES]


CASES = [(f, "float32") for f in (*FAMILIES, *OTHER_FAMILIES)] + [(f, "bfloat16") for f in DENSE]


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_mlx_lm_opens_it_with_equal_logits(family: str, dtype: str, tmp_path: Path) -> None:
    build, spec = tiny_model(family, dtype)
    trained = export_all(FolderWriter(tmp_path / "out", spec, build), RandomSource(build, spec, seed=2), spec)
    loaded, config = load_model(tmp_path / "out")
    assert config["torch_dtype"] == dtype
    # llama4's experts come out of mlx-lm's renaming as transposed views, and a fast BLAS rounds those otherwise
    with_weights(loaded, {name: mx.contiguous(w) for name, w in tree_flatten(loaded.parameters())})
    expected, found = logits(with_weights(build(), trained)), logits(loaded)
    assert expected.dtype == found.dtype
    assert mx.array_equal(expected, found)
    assert mx.isfinite(found).all().item()
    assert mx.max(mx.abs(found)).item() > 0


def test_tied_head_is_not_written(tmp_path: Path) -> None:
    build, spec = tiny_model("llama", tie_word_embeddings=True)
    export_all(FolderWriter(tmp_path / "out", spec, build), RandomSource(build, spec, seed=2), spec)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]
    load_model(tmp_path / "out")


LLAMA4_LAYER = {
    "feed_forward.experts.gate_up_proj": (4, 64, 192),
    "feed_forward.experts.down_proj": (4, 96, 64),
    "feed_forward.router.weight": (4, 64),
    "feed_forward.shared_expert.gate_proj.weight": (96, 64),
    "feed_forward.shared_expert.up_proj.weight": (96, 64),
    "feed_forward.shared_expert.down_proj.weight": (64, 96),
    "self_attn.q_proj.weight": (64, 64),
    "self_attn.k_proj.weight": (32, 64),
    "self_attn.v_proj.weight": (32, 64),
    "self_attn.o_proj.weight": (64, 64),
    "input_layernorm.weight": (64,),
    "post_attention_layernorm.weight": (64,),
}
LLAMA4_REST = {
    "language_model.model.embed_tokens.weight": (256, 64),
    "language_model.model.norm.weight": (64,),
    "language_model.lm_head.weight": (256, 64),
    "multi_modal_projector.linear_1.weight": (64, 48),
    "vision_model.class_embedding": (48,),
    "vision_model.model.layers.0.self_attn.q_proj.weight": (48, 48),
    "vision_model.model.layers.0.self_attn.q_proj.bias": (48,),
}


def scout_like_folder(write_folder: Write) -> Path:
    """A folder with the tensor names and shapes of a published Llama 4 Scout, written out by hand."""
    shapes = {
        f"language_model.model.layers.{i}.{name}": shape
        for i in range(4)
        for name, shape in LLAMA4_LAYER.items()
    }
    shapes |= LLAMA4_REST
    mx.random.seed(11)
    tensors = {name: mx.random.normal(shape).astype(mx.bfloat16) for name, shape in shapes.items()}
    names = sorted(shapes)
    files = {
        f"model-{k + 1:05d}-of-00003.safetensors": {n: tensors[n] for n in names[k::3]} for k in range(3)
    }
    config = tiny_config("llama4", torch_dtype="bfloat16")
    config |= {"vision_config": {"hidden_size": 48, "torch_dtype": "bfloat16"}, "torch_dtype": "bfloat16"}
    return write_folder(config, files=files)


def stored_bytes(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Every tensor of a folder as the reference library sees it: dtype, shape, raw bytes."""
    found = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        with safe_open(file, framework="mlx") as reference:
            assert set(reference.keys()) == header.keys() - {"__metadata__"}
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = (8 + length + offset for offset in entry["data_offsets"])
                found[name] = (entry["dtype"], entry["shape"], data[start:stop])
    return found


def test_llama4_comes_back_byte_for_byte(write_folder: Write, tmp_path: Path) -> None:
    folder = scout_like_folder(write_folder)
    config = json.loads((folder / "config.json").read_text())
    build, spec = tiny_model("llama4", "bfloat16")
    spec = ModelSpec(spec.name, spec.family, spec.dtype, spec.units, config)
    writer = FolderWriter(tmp_path / "out", spec, build, folder)
    export_all(writer, FolderSource(folder, build, spec), spec)
    before, after = stored_bytes(folder), stored_bytes(tmp_path / "out")
    assert after.keys() == before.keys()
    assert [name for name in before if before[name] != after[name]] == []
    towers = {name for name in LLAMA4_REST if not name.startswith("language_model")}
    assert set(writer.not_trained) == towers
    assert set(json.loads((tmp_path / "out" / "NOT_TRAINED.json").read_text())["tensors"]) == towers
    assert any("not trained" in note for note in writer.notes)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    load_model(tmp_path / "out")


def test_index_agrees_with_files_and_config_with_dtype(write_folder: Write, tmp_path: Path) -> None:
    folder = scout_like_folder(write_folder)
    build, spec = tiny_model("llama4", "float32", torch_dtype="bfloat16")
    out = tmp_path / "out"
    export_all(FolderWriter(out, spec, build, folder), FolderSource(folder, build, spec), spec)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(f.name for f in out.glob("*.safetensors"))
    assert files == [f"model-{k:05d}-of-00006.safetensors" for k in range(1, 7)]
    where = {}
    for name in files:
        with safe_open(out / name, framework="mlx") as file:
            assert file.metadata() == {"format": "pt"}
            where |= dict.fromkeys(file.keys(), name)
    assert index["weight_map"] == where
    stored = stored_bytes(out)
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in stored.values())
    assert {d for n, (d, _, _) in stored.items() if n.startswith("language_model")} == {"F32"}
    assert {d for n, (d, _, _) in stored.items() if n.startswith("vision_model")} == {"BF16"}
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == config["text_config"]["torch_dtype"] == "float32"


def test_files_and_folder_are_private_whatever_the_umask(write_folder: Write, tmp_path: Path) -> None:
    folder = llama_folder(write_folder)
    (folder / "tokenizer.json").write_text("{}")
    before = os.umask(0)
    try:
        export_llama(folder, tmp_path / "new" / "out")
    finally:
        os.umask(before)
    out = tmp_path / "new" / "out"
    assert out.stat().st_mode & 0o777 == 0o700
    assert {f.stat().st_mode & 0o777 for f in out.iterdir()} == {0o600}


def test_an_earlier_export_is_replaced_and_nothing_else(write_folder: Write, tmp_path: Path) -> None:
    folder = llama_folder(write_folder)
    out = tmp_path / "out"
    export_llama(folder, out)
    (folder / "tokenizer.json").write_text("{}")
    export_llama(folder, out)
    assert (out / "tokenizer.json").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out"}
    (out / "mine.txt").write_text("a user's file")
    with pytest.raises(UserError, match="did not write"):
        refuse_foreign(out)
    with pytest.raises(UserError, match="did not write"):
        export_llama(folder, out)
    assert (out / "mine.txt").read_text() == "a user's file"


@pytest.mark.parametrize("bait", ["file", "link", "full", "forged", "source"])
def test_a_foreign_place_is_refused(bait: str, write_folder: Write, tmp_path: Path) -> None:
    folder = llama_folder(write_folder)
    out = tmp_path / "out"
    if bait == "file":
        out.write_text("x")
    elif bait == "link":
        (tmp_path / "elsewhere").mkdir()
        out.symlink_to("elsewhere")
    elif bait == "source":
        out = folder
    else:
        out.mkdir()
        (out / "thesis.tex").write_text("x")
        (out / "EXPORT.json").write_text(
            "[]" if bait == "forged" else '{"written_by": "mlx_empire 1", "files": []}'
        )
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=str(out)):
        export_llama(folder, out)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_export_may_not_overwrite_the_folder_it_reads(write_folder: Write, tmp_path: Path) -> None:
    export_llama(llama_folder(write_folder), tmp_path / "out")
    with pytest.raises(UserError, match="was loaded from"):
        export_llama(tmp_path / "out", tmp_path / "out")


def test_an_error_leaves_the_earlier_export(write_folder: Write, tmp_path: Path) -> None:
    folder = llama_folder(write_folder)
    out = tmp_path / "out"
    export_llama(folder, out)
    before = stored_bytes(out)
    build, spec = tiny_model("llama")
    unit = {t.name: mx.zeros(t.shape) for t in spec.units[0].tensors}
    with pytest.raises(AssertionError, match="before"), FolderWriter(out, spec, build, folder) as writer:
        [writer.write_unit(0, unit) for _ in range(2)]
    assert stored_bytes(out) == before
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out"}


def test_what_a_killed_export_left_is_cleared(write_folder: Write, tmp_path: Path) -> None:
    folder = llama_folder(write_folder)
    build, spec = tiny_model("llama")
    FolderWriter(tmp_path / "out", spec, build, folder)  # never closed
    assert not (tmp_path / "out").exists()
    export_llama(folder, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out"}


def test_wrong_use_is_caught(tmp_path: Path) -> None:
    build, spec = tiny_model("llama")
    writer = FolderWriter(tmp_path / "out", spec, build)
    good = {t.name: mx.zeros(t.shape) for t in spec.units[0].tensors}
    with pytest.raises(AssertionError, match="not the spec's tensors"):
        writer.write_unit(0, {**good, "x": mx.zeros((1,))})
    with pytest.raises(AssertionError, match="not the spec's tensors"):
        writer.write_unit(0, {n: a.T for n, a in good.items()})
    writer.write_unit(0, good)
    with pytest.raises(AssertionError, match="written before"):
        writer.write_unit(0, good)
    with pytest.raises(AssertionError, match="were not written"):
        writer.close()


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, spec = tiny_model("llama")
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(NoRoomError, match=r" are free on its disk") as refused:
        FolderWriter(tmp_path / "deep" / "out", spec, build)
    assert refused.value.needed > 4 * spec.parameters
    assert not (tmp_path / "deep").exists()


def test_a_disk_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, spec = tiny_model("llama")
    writer = FolderWriter(tmp_path / "out", spec, build)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device", "model-00001")

    monkeypatch.setattr(export_folder, "write_tensors", full)
    with pytest.raises(UserError, match="No space left"):
        writer.write_unit(0, {t.name: mx.zeros(t.shape) for t in spec.units[0].tensors})


def test_a_bit_that_flips_on_the_disk_is_seen(write_folder: Write, tmp_path: Path) -> None:
    folder = llama_folder(write_folder)
    build, spec = tiny_model("llama")
    writer = FolderWriter(tmp_path / "out", spec, build, folder)
    for index in range(len(spec.units)):
        writer.write_unit(index, dict((t.name, a) for t, a in FolderSource(folder, build, spec).unit(index)))
    file = next((tmp_path / ".out.partial").glob("model-00002-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(NumericsError, match="reads back differently"):
        writer.close()
    assert not (tmp_path / "out").exists()


def test_writing_holds_one_tensor_beyond_the_unit(tmp_path: Path) -> None:
    build, spec = tiny_model("llama4", hidden_size=256, intermediate_size=512, intermediate_size_mlp=512)
    source = RandomSource(build, spec, seed=0)
    writer = FolderWriter(tmp_path / "out", spec, build)
    for index, unit in enumerate(spec.units):
        tensors = {t.name: a for t, a in source.unit(index)}
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        writer.write_unit(index, tensors)
        assert mx.get_peak_memory() - before <= 4 * 0.8 * unit.parameters  # the fused gate and up: two thirds
    writer.close()
