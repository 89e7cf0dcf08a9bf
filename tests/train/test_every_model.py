"""The command for every model of mlx-lm: a step and the trained model in final/, or one line and exit code 64."""

from __future__ import annotations

import json

import pytest
from support.every_model import models, small_config
from support.model_table import PAGE
from train.launching import Workspace, jsonl

RECIPE = """\
model: {{path: {name}, init: random, dtype: float32}}
data: {{path: data, format: tokens, sequence_length: 32}}
batch: {{global_size: 2, micro_size: 1}}
optimizer: {{learning_rate: 1.0e-3}}
run: {{dir: runs/{name}, steps: 1}}
"""
PARTS = 8


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_model_is_trained_and_written_or_refused_in_one_line(part, tmp_path):
    names = models()[part::PARTS]
    made = Workspace(tmp_path)
    made.write(
        "data/train.jsonl", jsonl({"tokens": [(7 * i + j) % 250 for j in range(30)]} for i in range(4))
    )
    for name in names:
        made.write(f"{name}/config.json", json.dumps(small_config(name)))
        made.write(f"{name}.yaml", RECIPE.format(name=name))
    (outcomes,) = made.train_many({name: [f"{name}.yaml"] for name in names})
    trained = [name for name in names if outcomes[name].code == 0]
    said = PAGE.read_text(encoding="utf-8")
    assert trained == [name for name in names if f"| {name} | trains |" in said]
    for name, outcome in outcomes.items():
        if name in trained:
            assert list((tmp_path / "runs" / name / "final").glob("*.safetensors")), name
            continue
        assert (outcome.code, len(outcome.said), outcome.stderr.count("\n")) == (64, 1, 1), (
            name,
            outcome.stderr,
        )
        assert name in outcome.said[0]
