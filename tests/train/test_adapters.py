"""The command with adapters, from recipe to folder: on one and two ranks, and for mlx-lm, which opens what is left."""

from __future__ import annotations

import json
import re
import shutil
import stat
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm import fuse
from mlx_lm.utils import quantize_model, save, save_model
from train.launching import MODEL, Workspace, curve, held_out, jsonl, raw_tensors, step_records, succeeded
from train.test_result import TRAIN, VALID, mean_loss

from mlx_empire.export import command as export
from mlx_empire.formats.hf_folder import open_folder
from mlx_empire.formats.source import FolderSource, TunedSource
from mlx_empire.model.config import read_config
from mlx_empire.model.target import make_target
from mlx_empire.recipe.sections import TuningSection

RECIPE = """\
model: {path: dense}
data: {path: rows, format: tokens, sequence_length: 64}
batch: {global_size: 6, micro_size: 1, cells: 2}
optimizer: {learning_rate: 5.0e-3}
run: {dir: run, steps: 4, eval_every: 4}
"""
KINDS: dict[str, list[str]] = {
    "lora": ["tuning.type=lora", "tuning.rank=4"],
    "dora": ["tuning.type=dora", "tuning.alpha=4", "tuning.targets=[q_proj,down_proj]", "tuning.layers=3"],
    "stored": ["tuning.type=lora", "model.path=packed"],
    "qlora": ["tuning.type=qlora", "tuning.bits=4"],
}
FLOATING = ("mxfp4", "mxfp8", "nvfp4")
SPREAD = {  # where layers are recomputed, buffers of whole units are handed out again, also while the result is written
    "stage 3": ["memory.zero_stage=3", "memory.shares=[2,1]", "memory.gradient_checkpointing=true"],
    "stage 2": ["memory.zero_stage=2"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with the model in float32 (`dense`), the same in four bits (`packed`), and rows of tokens."""
    made = Workspace(tmp_path_factory.mktemp("adapters"))
    made.write("recipe.yaml", RECIPE)
    for name, rows in (("train", TRAIN), ("valid", VALID)):
        made.write(f"rows/{name}.jsonl", jsonl({"tokens": tokens} for tokens in rows))
    config = read_config(MODEL)
    packing = {"quantization": {"group_size": 64, "bits": 4}}
    for name, more in (("dense", {}), ("packed", packing)):
        model, _ = mlx_lm.load(str(MODEL))
        model.set_dtype(mx.float32)
        if more:
            nn.quantize(model, 64, 4)
        save_model(made.folder / name, model)
        for file in MODEL.glob("token*"):
            shutil.copy(file, made.folder / name)
        made.write(f"{name}/config.json", json.dumps({**config, "torch_dtype": "float32", **more}))
    return made


@pytest.fixture(scope="module")
def alone(place: Workspace) -> Workspace:
    commands = {kind: ["recipe.yaml", *asked, f"run.dir={kind}"] for kind, asked in KINDS.items()}
    for outcome in place.train_many(commands)[0].values():
        assert "the trained adapters are in" in succeeded(outcome).stdout
    return place


@pytest.fixture(scope="module")
def floating(place: Workspace) -> Workspace:
    """Of each floating-point format two runs: on a folder by mlx-lm, and on the dense one."""
    commands = {}
    for mode in FLOATING:
        model, tokenizer, config = mlx_lm.load(str(place.folder / "dense"), return_config=True)
        model, config = quantize_model(model, config, None, None, mode)
        save(place.folder / mode, str(place.folder / "dense"), model, tokenizer, config)
        asked = ["recipe.yaml", "tuning.type=qlora", "tuning.rank=4"]
        commands[f"stored {mode}"] = [*asked, f"model.path={mode}", f"run.dir=stored {mode}"]
        commands[f"packed {mode}"] = [*asked, f"tuning.bits={mode}", f"run.dir=packed {mode}"]
    for outcome in place.train_many(commands)[0].values():
        succeeded(outcome)
    return place


@pytest.fixture(scope="module")
def spread(alone: Workspace) -> Workspace:
    commands = {
        f"{kind} {stage}": ["recipe.yaml", *asked, *how, f"run.dir={kind} {stage}"]
        for kind, asked in KINDS.items()
        for stage, how in SPREAD.items()
    }
    for rank in alone.train_many(commands, ranks=2):
        for outcome in rank.values():
            succeeded(outcome)
    return alone


def result(run: Path) -> tuple[Any, ...]:
    return (
        curve(run),
        held_out(run),
        raw_tensors(run / "final"),
        (run / "final/adapter_config.json").read_text(),
    )


@pytest.mark.parametrize("stage", SPREAD)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_the_same_adapter_as_one(kind: str, stage: str, spread: Workspace) -> None:
    assert result(spread.folder / f"{kind} {stage}") == result(spread.folder / kind)


def test_a_rank_without_the_folder_gets_its_part_of_a_packed_base(alone: Workspace) -> None:
    empty = alone.folder / "elsewhere"
    empty.mkdir()
    asked = ["tuning.type=qlora", "memory.zero_stage=3", "run.dir=sent"]
    ended = alone.train(alone.folder / "recipe.yaml", *asked, folders=[alone.folder, empty])
    assert "weights read by rank 0" in succeeded(ended).stdout
    assert result(alone.folder / "sent") == result(alone.folder / "qlora")


@pytest.mark.parametrize("mode", FLOATING)
@pytest.mark.slow
def test_a_base_stored_in_a_floating_point_format_is_what_it_is_packed_while_loading(
    mode: str, floating: Workspace
) -> None:
    """A folder by mlx-lm in that format, and the dense one packed while it is loaded: the same run, bit for bit."""
    assert result(floating.folder / f"stored {mode}") == result(floating.folder / f"packed {mode}")
    losses = [record["loss"] for record in step_records(floating.folder / f"stored {mode}")]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_leaves_mlx_lms_two_files_for_its_owner_alone(kind: str, alone: Workspace) -> None:
    run = alone.folder / kind
    assert {f.name for f in (run / "final").iterdir()} == {
        "adapters.safetensors",
        "adapter_config.json",
        "peft",
        "README.md",
        "EXPORT.json",
    }
    assert {f.name for f in (run / "final/peft").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    for path in (run, *run.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    losses = [record["loss"] for record in step_records(run)]  # every step reads all rows
    assert losses == sorted(losses, reverse=True)
    assert (run / "COMPLETE").exists()


@pytest.mark.parametrize("kind", ["lora", "dora", "stored"])
def test_mlx_lm_opens_it_with_the_same_logits(kind: str, alone: Workspace) -> None:
    """Bit for bit those of our own model with the adapter's tensors; and its loss is the one that the run reported."""
    run = alone.folder / kind
    folder = alone.folder / ("packed" if kind == "stored" else "dense")
    theirs, _ = mlx_lm.load(str(folder), adapter_path=str(run / "final"))
    ours = model_of(folder, kind, run)
    tokens = mx.array([TRAIN[0]])
    plain, _ = mlx_lm.load(str(folder))
    assert mx.array_equal(theirs(tokens), ours(tokens))
    assert not mx.allclose(theirs(tokens), plain(tokens), atol=1e-2)
    (_, before), (_, after) = held_out(run)
    assert mean_loss(plain, VALID) == pytest.approx(before, rel=1e-5)
    assert mean_loss(theirs, VALID) == pytest.approx(after, rel=1e-5)


def model_of(folder: Path, kind: str, run: Path) -> nn.Module:
    """Our model as it is built and loaded for training, with the adapters that the run left."""
    written = {
        "lora": {"type": "lora", "rank": 4},
        "dora": {"type": "dora", "alpha": 4.0, "targets": ("q_proj", "down_proj"), "layers": 3},
        "stored": {"type": "lora"},
    }[kind]
    tuning, stored = TuningSection.model_validate(written), open_folder(folder).stored()
    built = make_target(read_config(folder), tuning, str(folder), "float32", stored)
    source = TunedSource(FolderSource(folder, built.rebuild, built.base), built.spec, 0, built.packing)
    for index in range(len(built.spec.units)):
        built.model.load_weights([(t.name, array) for t, array in source.unit(index)], strict=False)
    adapters = mx.load(str(run / "final/adapters.safetensors"))
    assert adapters.keys() == {t.name for u in built.spec.units for t in u.tensors if t.trainable}
    built.model.load_weights(list(adapters.items()), strict=False)
    built.model.eval()
    return built.model


def test_quantising_while_loading_is_a_quantised_folder(alone: Workspace) -> None:
    """QLoRA on the dense folder trains the very adapter that LoRA trains on what mlx-lm has quantised."""
    assert result(alone.folder / "qlora") == result(alone.folder / "stored")


@pytest.mark.parametrize("kind", ["lora", "dora", "qlora", "stored"])
def test_merged_it_has_the_same_logits(kind: str, alone: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """By our export; QLoRA's on the values that its base was packed to, which mlx-lm's packed folder has too.

    Merged into that one, the weights are plain.
    """
    monkeypatch.chdir(alone.folder)
    assert export.main(["merge", kind, f"{kind} merged"]) == 0
    merged, _ = mlx_lm.load(str(alone.folder / f"{kind} merged"))
    base = "packed" if kind in ("qlora", "stored") else "dense"
    adapted, _ = mlx_lm.load(base, adapter_path=f"{kind}/final")
    tokens = mx.array([TRAIN[0]])
    assert mx.allclose(merged(tokens), adapted(tokens), atol=1e-4)
    assert (
        (alone.folder / f"{kind} merged/README.md")
        .read_text()
        .startswith(f"---\nbase_model: {'packed' if kind == 'stored' else 'dense'}")
    )


@pytest.mark.parametrize("mode", FLOATING)
@pytest.mark.slow
def test_merged_into_a_floating_point_base_it_has_the_same_logits(
    mode: str, floating: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(floating.folder)
    assert export.main(["merge", f"stored {mode}", f"{mode} merged"]) == 0
    merged, _ = mlx_lm.load(f"{mode} merged")
    adapted, _ = mlx_lm.load(mode, adapter_path=f"stored {mode}/final")
    tokens = mx.array([TRAIN[0]])
    assert mx.allclose(merged(tokens), adapted(tokens), atol=1e-4)


@pytest.mark.parametrize("pack", ["4", "stored"])
def test_packed_again_it_says_what_is_left_of_the_adapter(
    pack: str, alone: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The three losses are those that mlx-lm's own models have on the held-out rows."""
    monkeypatch.chdir(alone.folder)
    out = f"packed again as {pack}"
    assert export.main(["merge", "stored", out, "--pack", pack]) == 0
    said = capsys.readouterr().out
    models = [
        mlx_lm.load("packed")[0],
        mlx_lm.load("packed", adapter_path="stored/final")[0],
        mlx_lm.load(out)[0],
    ]
    before, adapted, after = (mean_loss(model, VALID) for model in models)
    assert [float(x) for x in re.findall(r"\d+\.\d{4}", said)] == pytest.approx(
        [before, adapted, after], abs=1e-3
    )
    assert f"{(before - after) / (before - adapted):.0%} of the adapter's gain is left" in said
    packed = {n for n, a in tree_flatten(models[2].parameters()) if a.dtype == mx.uint32}
    assert packed == {n for n, a in tree_flatten(models[0].parameters()) if a.dtype == mx.uint32}


def test_without_a_run_it_says_that_packing_was_not_measured(
    alone: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(alone.folder)
    shutil.copytree("stored/final", "apart/adapter")
    assert export.main(["merge", "apart/adapter", "unmeasured", "--model", "packed", "--pack", "8"]) == 0
    assert "was not measured: apart/adapter is no run's folder" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["lora", "stored"])
def test_mlx_lm_fuses_it(kind: str, alone: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(alone.folder)
    base = "packed" if kind == "stored" else "dense"
    words = ["--model", base, "--adapter-path", f"{kind}/final", "--save-path", f"{kind} fused"]
    monkeypatch.setattr("sys.argv", ["fuse", *words, *(["--dequantize"] if kind == "stored" else [])])
    fuse.main()
    fused, _ = mlx_lm.load(f"{kind} fused")
    adapted, _ = mlx_lm.load(base, adapter_path=f"{kind}/final")
    tokens = mx.array([TRAIN[0]])
    assert mx.allclose(fused(tokens), adapted(tokens), atol=1e-4)


def test_a_ternary_base_is_packed_for_mlx_lm(alone: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on the dense folder packed while loading, and its adapter on a folder that was packed for good."""
    monkeypatch.chdir(alone.folder)
    assert export.main(["base", "dense", "ternary base", "--bits", "ternary"]) == 0
    asked = ["tuning.type=qlora", "tuning.bits=ternary", "run.dir=ternary"]
    succeeded(alone.train("recipe.yaml", *asked))
    model, _ = mlx_lm.load("ternary base", adapter_path="ternary/final")
    (_, _), (_, after) = held_out(alone.folder / "ternary")
    assert mean_loss(model, VALID) == pytest.approx(after, rel=1e-5)
    assert export.main(["merge", "ternary", "ternary merged"]) == 0
    merged, _ = mlx_lm.load("ternary merged")
    tokens = mx.array([TRAIN[0]])
    assert mx.allclose(merged(tokens), model(tokens), atol=1e-4)


def test_a_plan_says_what_is_trained(alone: Workspace) -> None:
    plan = json.loads((alone.folder / "lora/plan.json").read_text())
    adapters = raw_tensors(alone.folder / "lora/final")
    assert plan["parameters"] == 279_232 + plan["trainable_parameters"]
    for kind in ("qlora", "stored"):  # packed weights are counted as what they stand for
        packed = json.loads((alone.folder / kind / "plan.json").read_text())
        assert packed["parameters"] == 279_232 + packed["trainable_parameters"]
    assert plan["trainable_parameters"] * 4 == sum(len(data) for _, _, data in adapters.values())
    (only,) = plan["ranks"]
    assert only["ledger"]["adapters"] >= plan["trainable_parameters"] * 4
    for record in step_records(alone.folder / "lora"):
        assert record["peak_bytes"][0] <= 1.1 * record["predicted_peak_bytes"][0]
