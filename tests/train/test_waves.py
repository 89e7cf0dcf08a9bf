"""A run whose micro-batches do not fit together: they pass in waves, and the result is the same."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from train.launching import MODEL, Workspace, curve, jsonl, raw_tensors, succeeded
from train.test_result import TRAIN, VALID

RECIPE = f"""\
model: {{path: {MODEL}, dtype: float32}}
tuning: {{type: lora, rank: 4}}
data: {{path: rows, format: tokens, sequence_length: 64}}
batch: {{global_size: 64, micro_size: 1, cells: 2}}
memory: {{gradient_checkpointing: true}}
optimizer: {{learning_rate: 5.0e-3}}
run: {{dir: run, steps: 2, eval_every: 2}}
"""


def test_an_adapter_trains_where_the_inputs_of_all_rows_have_no_room(tmp_path: Path) -> None:
    place = Workspace(tmp_path)
    place.write("recipe.yaml", RECIPE)
    for name, rows in (("train", TRAIN), ("valid", VALID)):
        place.write(f"rows/{name}.jsonl", jsonl({"tokens": tokens} for tokens in rows))
    whole = succeeded(place.train("recipe.yaml", "run.dir=whole"))
    peak = json.loads((tmp_path / "whole" / "plan.json").read_text())["ranks"][0]["peak_bytes"]
    limit = peak * 3 // 4
    place.write("small.txt", f"{socket.gethostname()} slots=1 # memory=64GiB limit={limit / 1e6:.6f}MB\n")
    waves = succeeded(place.train("recipe.yaml", "run.dir=waves", "--hosts", "small.txt"))
    assert "at a time" in waves.stdout
    assert "at a time" not in whole.stdout
    assert curve(tmp_path / "waves") == curve(tmp_path / "whole")
    assert raw_tensors(tmp_path / "waves" / "final") == raw_tensors(tmp_path / "whole" / "final")
    record = json.loads((tmp_path / "waves" / "metrics.jsonl").read_text().splitlines()[-2])
    assert record["peak_bytes"][0] <= 1.01 * record["predicted_peak_bytes"][0] <= 1.01 * limit
