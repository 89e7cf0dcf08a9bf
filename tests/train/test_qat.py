"""Ternary training through the command: the warm-up in the records, a continued run's bits, what the result holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.bitlinear_layers import BitLinear
from mlx_lm.utils import load_model
from qat.test_bitnet import as_the_kernel_reads
from train.launching import Outcome, Workspace, curve, held_out, raw_tensors, step_records, succeeded

from mlx_empire.export.command import main as export

QAT = (
    "tuning.qat=ternary",
    "tuning.qat_warmup=3",
    "run.steps=5",
    "run.save_every=2",
    "run.eval_every=5",
    "optimizer.statistics_every=null",
)
MATRIX = ("tuning.qat_group=matrix", "model.dtype=bfloat16", "run.dir=matrix")
COMMANDS = {
    "group": (*QAT, "run.dir=group"),
    "matrix": (*QAT, *MATRIX),
    "adapters": ("tuning.type=lora", "tuning.qat=ternary", "run.dir=a"),
    "alone": ("tuning.qat_group=64", "run.dir=b"),
    "too long": ("tuning.qat=ternary", "tuning.qat_warmup=9", "run.dir=c"),
}
RELEASED, HALF = "optimizer.in_backward=true", ("model.dtype=float16", "numerics.loss_scale_window=2")
# With gradients that are used up as they come, and with weights and gradients in float16: what a run on so many ranks
# asks for, which must have the bits of the other.
BESIDE: dict[str, dict[int, tuple[str, ...]]] = {
    "released": {
        1: (RELEASED, "memory.zero_stage=1"),
        2: (RELEASED, "memory.zero_stage=3", "memory.shares=[2,1]"),
    },
    "half": {1: (*HALF, "memory.zero_stage=0"), 2: (*HALF, "memory.zero_stage=3")},
    "both": dict.fromkeys((1, 2), ("model.dtype=float16", "numerics.loss_scale=256", RELEASED)),
}
REFUSED = {
    "adapters": "tuning.qat: qat has no meaning for type lora",
    "alone": "tuning.qat_group: qat_group has no meaning without tuning.qat",
    "too long": "tuning.qat_warmup: qat_warmup 9 is longer than the whole run, run.steps 3",
}


@pytest.fixture(scope="module")
def outcomes(workspace: Workspace) -> dict[str, Outcome]:
    commands = {name: ("recipe.yaml", *arguments) for name, arguments in COMMANDS.items()}
    return workspace.train_many(commands)[0]


def floats(raw: tuple[str, tuple[int, ...], bytes]) -> np.ndarray:
    """A stored tensor's numbers."""
    dtype, shape, data = raw
    wide = np.frombuffer(data, np.float32 if dtype == "F32" else np.uint16)
    found = wide if dtype == "F32" else (wide.astype(np.uint32) << 16).view(np.float32)
    return found.reshape(shape)


def matrices(folder: Path) -> dict[str, np.ndarray]:
    """The layers' matrices by name; all have whole groups of 64 inputs."""
    found = {name: floats(raw) for name, raw in raw_tensors(folder).items() if ".layers." in name}
    return {name: array for name, array in found.items() if array.ndim == 2}


def is_ternary(weight: np.ndarray, inputs: int) -> bool:
    sizes = np.abs(weight.reshape(-1, inputs))
    return bool(((sizes == 0) | (sizes == sizes.max(axis=1, keepdims=True))).all())


def test_a_run_goes_on_in_its_warm_up_to_the_same_bits(workspace, outcomes):
    succeeded(outcomes["group"])
    first, again = workspace.folder / "group", workspace.folder / "group-again"
    strengths = [record["qat_strength"] for record in step_records(first)]
    assert strengths == [0.0, 1 / 3, 2 / 3, 1.0, 1.0]
    shutil.copytree(first, again)
    shutil.rmtree(again / "final")
    for step in (4, 5):
        shutil.rmtree(again / "checkpoints" / f"step-{step:06d}")
    (again / "COMPLETE").unlink()
    succeeded(workspace.train("recipe.yaml", *QAT, "run.dir=group-again"))
    assert raw_tensors(first / "final") == raw_tensors(again / "final")
    same = [[(r["loss"], r["qat_strength"]) for r in step_records(run)] for run in (first, again)]
    assert same[0] == same[1]


@pytest.mark.parametrize("name", ["group", "matrix"])
def test_the_result_holds_ternary_matrices(workspace, outcomes, name):
    succeeded(outcomes[name])
    found = matrices(workspace.folder / name / "final")
    assert len(found) == 35
    for weight in found.values():
        assert is_ternary(weight, 64 if name == "group" else weight.size)
        assert 0.05 < (weight == 0).mean() < 0.95
    card = (workspace.folder / name / "final" / "README.md").read_text()
    assert "full fine-tuning with ternary weights (quantisation-aware training)" in card
    assert json.loads((workspace.folder / name / "plan.json").read_text())["steps"] == 5


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_is_refused(outcomes, name):
    assert outcomes[name].code == 64
    assert REFUSED[name] in outcomes[name].stderr


@pytest.mark.parametrize("kinds", [["released", "half"], pytest.param(["both"], marks=pytest.mark.slow)])
def test_beside_other_techniques_it_has_the_same_bits_on_one_rank_and_two(workspace, kinds):
    for ranks in (1, 2):
        commands = {
            kind: ("recipe.yaml", *QAT, *BESIDE[kind][ranks], f"run.dir={kind}-{ranks}") for kind in kinds
        }
        for found in workspace.train_many(commands, ranks=ranks if ranks > 1 else 0):
            for kind in kinds:
                succeeded(found[kind])
    for kind in kinds:
        runs = [workspace.folder / f"{kind}-{ranks}" for ranks in (1, 2)]
        alone, spread = ((curve(run), held_out(run), raw_tensors(run / "final")) for run in runs)
        assert alone == spread
        losses = [loss for _, loss, _ in alone[0]]
        assert len(set(losses)) == 5
        assert np.isfinite(losses).all()


@pytest.fixture(scope="module")
def exported(workspace, outcomes) -> dict[str, Path]:
    """Each result packed as its run's last lines say."""
    made = {}
    for name, words in {"group": ("base", "--bits", "ternary"), "matrix": ("bitnet",)}.items():
        succeeded(outcomes[name])
        made[name] = workspace.folder / f"{name}-packed"
        final = workspace.folder / name / "final"
        said = " ".join(["mlx-empire export", words[0], f"{name}/final", "OUT", *words[1:]])
        assert said in outcomes[name].stdout
        assert export([words[0], str(final), str(made[name]), *words[1:]]) == 0
    return made


def packed_values(folder: Path) -> dict[str, np.ndarray]:
    """What mlx-lm's modules stand for, by their bytes."""
    model = load_model(folder, lazy=True)[0]
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear):
            parts = (module.weight, module.scales, module.biases)
            found[f"{path}.weight"] = np.array(mx.dequantize(*parts, module.group_size, module.bits))
        elif isinstance(module, BitLinear):
            assert not module.invert_weight_scales
            scale = np.array(module.weight_scale.astype(mx.float32))
            found[f"{path}.weight"] = as_the_kernel_reads(np.array(module.weight), scale[0])
    return found


@pytest.mark.parametrize("name", ["group", "matrix"])
def test_packed_it_has_the_same_values_for_mlx_lm(workspace, exported, name):
    """MLX's two bits in groups, and BitNet's bytes with one scale: not a bit is lost."""
    plain, packed = matrices(workspace.folder / name / "final"), packed_values(exported[name])
    assert packed.keys() == plain.keys()
    assert all(np.array_equal(packed[key], plain[key]) for key in plain)
    table = json.loads((exported[name] / "packing.json").read_text())
    assert table["total"]["error"] == 0
    assert table["total"]["bits"] == pytest.approx(3.0 if name == "group" else 2.0, abs=0.01)
    assert len(table["layers"]) == 5
    assert len(table["matrices"]) == 35


@pytest.mark.parametrize("name", ["group", "matrix"])
def test_the_result_says_what_rounding_takes_from_its_real_weights(workspace, outcomes, name):
    succeeded(outcomes[name])
    table = json.loads((workspace.folder / name / "final" / "packing.json").read_text())
    assert 0.3 < table["total"]["error"] < 0.8  # of normal weights 0.44: sqrt(1 - E[wq]^2 / E[q^2])
    sizes = {key: weight.size for key, weight in matrices(workspace.folder / name / "final").items()}
    scales = 8 if name == "group" else 2  # float32 scale and bias of 64 inputs; one in bfloat16
    for key, one in table["matrices"].items():
        size = sizes[f"{key}.weight"]
        assert one["bytes"] == size // 4 + (scales * size // 64 if name == "group" else scales)
    assert "of their norm (packing.json has each layer)" in outcomes[name].stdout + outcomes[name].stderr


def test_groups_do_not_fit_bitnets_layout(workspace, outcomes, tmp_path, capsys):
    succeeded(outcomes["group"])
    with pytest.raises(SystemExit) as ended:
        export(["bitnet", str(workspace.folder / "group" / "final"), str(tmp_path / "out")])
    assert ended.value.code == 64
    assert "train with tuning.qat: ternary and tuning.qat_group: matrix" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_adapters_go_on_from_bitnets_layout(workspace, exported):
    """Its held-out loss before the first step is that of the ternary run's end, in its dtype; then it learns."""
    run = ("run.dir=on-bitnet", "run.steps=3", "run.eval_every=3", "tuning.type=lora")
    done = succeeded(
        workspace.train("recipe.yaml", f"model.path={exported['matrix']}", "model.dtype=bfloat16", *run)
    )
    assert "mlx-empire export merge on-bitnet OUT" in done.stdout
    assert "mlx_lm.generate" not in done.stdout  # it puts no adapters into BitNet's modules
    (_, before), (_, after) = held_out(workspace.folder / "on-bitnet")
    assert before == pytest.approx(held_out(workspace.folder / "matrix")[-1][1], rel=2e-3)
    assert after < before
    merged, folder = workspace.folder / "merged", workspace.folder / "on-bitnet"
    base = ["--model", str(exported["matrix"])]
    assert export(["merge", str(folder / "final"), str(merged), *base]) == 0
    pairs = matrices(merged), matrices(workspace.folder / "matrix" / "final")
    assert pairs[0].keys() == pairs[1].keys()
    changed = [np.abs(pairs[0][key] - pairs[1][key]).max() for key in pairs[0]]
    assert 0 < max(changed) < 0.1
