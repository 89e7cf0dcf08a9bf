"""OLMo 1 and Falcon as transformers saves them: read, trained by the command, exported, opened by transformers again.

Needs torch and peft, which `make test` does not install: run it by `make test-interop`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from mlx_lm.tuner.utils import load_adapters
from support.our_families import CASES, FIXTURE, TOKENS, kept, torch_logits, torch_model
from train.launching import Outcome, Workspace, curve, jsonl, raw_tensors, succeeded

from mlx_empire.formats.hf_folder import open_folder
from mlx_empire.formats.source import FolderSource
from mlx_empire.model.config import read_config
from mlx_empire.model.target import make_target
from mlx_empire.recipe.sections import TuningSection

torch = pytest.importorskip("torch", reason="torch is not installed: run `make test-interop`")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TRAINED = ("olmo clipped", "olmo tied", "falcon-7b", "falcon-11b", "falcon-rw")
ADAPTED = ("olmo clipped", "falcon-40b", "falcon-rw")
RECIPE = """\
model: {path: PATH}
data: {path: rows.jsonl, format: tokens, sequence_length: 48}
batch: {global_size: 4, micro_size: 1, cells: 2}
optimizer: {learning_rate: 3.0e-3}
run: {dir: run, steps: 2}
"""
ROWS = [row[i : i + 49] for row in TOKENS for i in (0, 100)]


def ours(folder: Path) -> np.ndarray:
    """Logits through the product's own reading."""
    target = make_target(
        read_config(folder), TuningSection(), folder.name, "float32", open_folder(folder).stored()
    )
    source = FolderSource(folder, target.rebuild, target.base)
    for index in range(len(target.spec.units)):
        target.model.load_weights([(t.name, array) for t, array in source.unit(index)], strict=False)
    return logits(target.model)


def logits(model: nn.Module) -> np.ndarray:
    return np.array(model.eval()(mx.array(TOKENS)))


def opened(folder: Path) -> Any:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_the_fixture_of_every_day_is_what_transformers_computes(name: str) -> None:
    known = np.array(json.loads(FIXTURE.read_text(encoding="utf-8"))[name])
    assert np.abs(kept(torch_logits(torch_model(name))) - known).max() < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_a_folder_that_transformers_saved_has_its_logits(name: str, tmp_path: Path) -> None:
    model = torch_model(name)
    model.save_pretrained(tmp_path)
    assert np.abs(ours(tmp_path) - torch_logits(model)).max() < 1e-4


@pytest.mark.parametrize("told", [False, True])
def test_a_head_of_its_own_is_read_where_the_configuration_does_not_speak_of_it(
    told: bool, tmp_path: Path
) -> None:
    """As the published Falcons are: the head is stored, and config.json is silent, or as transformers writes it."""
    model = torch_model("falcon-11b")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    if not told:
        del config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert np.abs(ours(tmp_path) - torch_logits(model)).max() < 1e-4


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    made = Workspace(tmp_path_factory.mktemp("families"))
    made.write("rows.jsonl", jsonl({"tokens": row} for row in ROWS))
    made.write("recipe.yaml", RECIPE)
    for name in {*TRAINED, *ADAPTED}:
        torch_model(name).save_pretrained(made.folder / name)
    return made


def commands(work: Workspace, ranks: int) -> dict[str, list[str]]:
    """Full tuning and LoRA of each model."""
    kinds = {"full": TRAINED, "lora": ADAPTED}
    return {
        f"{kind} {name}": [
            "recipe.yaml",
            f"model.path={work.folder / name}",
            f"tuning.type={kind}",
            f"run.dir={kind}-{name}-{ranks}",
        ]
        for kind, names in kinds.items()
        for name in names
    }


@cache
def launched(work: Workspace, ranks: int) -> Mapping[str, Outcome]:
    outcomes, *_ = work.train_many(commands(work, ranks), ranks=ranks)
    return outcomes


@pytest.mark.parametrize("name", TRAINED)
def test_two_ranks_train_to_the_bits_of_one_and_transformers_opens_the_result(
    name: str, work: Workspace
) -> None:
    for ranks in (1, 2):
        succeeded(launched(work, ranks)[f"full {name}"])
    alone, both = (work.folder / f"full-{name}-{ranks}" for ranks in (1, 2))
    assert curve(alone) == curve(both)
    assert raw_tensors(alone / "final") == raw_tensors(both / "final")
    assert raw_tensors(alone / "final").keys() == raw_tensors(work.folder / name).keys()
    found = torch_logits(opened(alone / "final"))
    assert np.abs(found - ours(alone / "final")).max() < 1e-4
    assert np.abs(found - torch_logits(torch_model(name))).max() > 0.05
    again, _ = mlx_lm.utils.load_model(alone / "final")  # our file, found by mlx-lm's own loader
    assert np.abs(found - logits(again)).max() < 1e-4


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_have_pefts_names_and_its_logits(name: str, work: Workspace) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: run `make test-interop`")
    for ranks in (1, 2):
        succeeded(launched(work, ranks)[f"lora {name}"])
    alone, both = (work.folder / f"lora-{name}-{ranks}/final" for ranks in (1, 2))
    assert raw_tensors(alone) == raw_tensors(both)
    model = peft.PeftModel.from_pretrained(torch_model(name), alone / "peft")
    report = model.load_adapter(str(alone / "peft"), "again")
    assert not report.unexpected_keys
    assert not [key for key in report.missing_keys if "lora" in key]
    found = torch_logits(model.eval())
    assert np.abs(found - torch_logits(torch_model(name))).max() > 0.05
    base, _ = mlx_lm.utils.load_model(work.folder / name, model_config=read_config(work.folder / name))
    assert np.abs(found - logits(load_adapters(base, str(alone)))).max() < 1e-4
