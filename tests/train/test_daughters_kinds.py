"""Daughters of every kind of adapter, together on one base or one at a time: each what it would be alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import save_model
from support.tiny_models import tiny_config, tiny_model
from train.launching import MODEL, Workspace, curve, held_out, jsonl, raw_tensors, succeeded
from train.test_result import TRAIN, VALID

RECIPE = f"""\
model: {{path: {MODEL}, dtype: float32}}
data: {{path: people, format: tokens, sequence_length: 64}}
batch: {{global_size: 2, micro_size: 1}}
optimizer: {{learning_rate: 5.0e-3, weight_decay: 0.1}}
schedule: {{type: cosine, warmup: 1, final: 0.1}}
run: {{dir: runs, steps: 4, eval_every: 2}}
"""
NAMES = ("anna", "bert")
MIXTURE = ["tuning.type=lora", "model.path=mixture"]
KINDS = {
    "dora": ["tuning.type=dora"],
    "experts": [*MIXTURE, "tuning.targets=[experts,q_proj]"],
    "embedding and head": [*MIXTURE, "tuning.targets=[embed_tokens,lm_head,v_proj]"],
    "tied embedding": ["tuning.type=lora", "tuning.targets=[embed_tokens,o_proj]"],
    "released": ["tuning.type=dora", "optimizer.in_backward=true", "optimizer.clip_norm=0.5"],
    "dropout": ["tuning.type=dora", "tuning.dropout=0.1"],
    "dropout of experts": [*MIXTURE, "tuning.targets=[experts,q_proj]", "tuning.dropout=0.1"],
    "one by one": ["tuning.type=dora"],
}
TOGETHER = {kind: 1 if kind == "one by one" else 2 for kind in KINDS}


def save_mixture(folder: Path) -> None:
    """A tiny qwen3_moe with random weights in float32."""
    mx.random.seed(3)
    model = tiny_model("qwen3_moe")[0]()
    mx.eval(model.parameters())
    assert all(a.dtype == mx.float32 for _, a in tree_flatten(model.parameters()))
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(tiny_config("qwen3_moe")))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Every kind for two people by the command for many, and for each of them alone: all in one process."""
    made = Workspace(tmp_path_factory.mktemp("one by one"))
    made.write("recipe.yaml", RECIPE)
    save_mixture(made.folder / "mixture")
    for number, name in enumerate(NAMES):
        for split, rows in (("train", TRAIN), ("valid", VALID)):
            own = [[t % 256 for t in rows[(i + number) % len(rows)][number:]] for i in range(2 + number)]
            made.write(f"people/{name}/{split}.jsonl", jsonl({"tokens": tokens} for tokens in own))
    commands: dict[str, list[str]] = {}
    for kind, asked in KINDS.items():
        common = ["recipe.yaml", *asked, "tuning.rank=4"]
        commands[kind] = ["daughters", *common, "--people", "people", f"run.dir=many {kind}"]
        commands[kind].append(f"--together={TOGETHER[kind]}")
        for name in NAMES:
            own = [f"data.path=people/{name}", f"run.dir=alone {kind}/{name}"]
            commands[f"{kind} {name}"] = [*common, *own]
    for outcome in made.train_many(commands)[0].values():
        succeeded(outcome)
    made.write("outcomes.txt", (made.folder / "outcomes-0.json").read_text())
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_each_is_what_she_is_alone(kind: str, trained: Workspace) -> None:
    """The second one, too, who takes the first one's place: losses, norms and adapter, to a few 1e-5."""
    said = json.loads((trained.folder / "outcomes.txt").read_text())[kind]["stdout"]
    assert re.search(rf"2 of 2 daughters, up to {TOGETHER[kind]} together", said)
    adapters = []
    for name in NAMES:
        run, alone = (trained.folder / f"{how} {kind}/{name}" for how in ("many", "alone"))
        assert (run / "COMPLETE").exists()
        assert [s for s, _, _ in curve(run)] == [1, 2, 3, 4]
        for ours, theirs in zip(zip(*curve(run), strict=True), zip(*curve(alone), strict=True), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)  # steps, losses, norms
        ours, theirs = ([loss for _, loss in held_out(where)] for where in (run, alone))
        assert ours[-len(theirs) :] == pytest.approx(theirs, rel=1e-5)
        assert ours[-1] != ours[0]
        found, expected = (raw_tensors(where / "final") for where in (run, alone))
        assert found.keys() == expected.keys()
        for tensor, (dtype, shape, raw) in expected.items():
            assert found[tensor][:2] == (dtype, shape)
            values, should = (np.frombuffer(data, np.float32) for data in (found[tensor][2], raw))
            assert np.abs(values - should).max() < 2e-4, tensor
        adapters.append(found)
        folder = MODEL if "mixture" not in str(KINDS[kind]) else trained.folder / "mixture"
        if folder == MODEL:  # mlx_lm.load wants a tokenizer
            model, _ = mlx_lm.load(str(folder), adapter_path=str(run / "final"))
            assert mx.isfinite(model(mx.array([TRAIN[0]]))).all()
    assert any(adapters[0][tensor] != adapters[1][tensor] for tensor in adapters[0])
