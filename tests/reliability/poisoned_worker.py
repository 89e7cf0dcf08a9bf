"""Run by mpirun: one run after the other, each with a fault of its own in the environment; what came of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from train.many_commands import outcome

from mlx_empire.phases import FAULT_VARIABLE

CASES = {
    "loss": "rank=1;step=2;phase=forward;action=nan",
    "gradient": "rank=0;step=2;phase=backward;action=nan",
    "transient": "rank=1;step=2;phase=backward;action=nan;once=struck",
}

if __name__ == "__main__":
    outcomes = {}
    for name, fault in CASES.items():
        os.environ[FAULT_VARIABLE] = fault
        outcomes[name] = outcome(
            ["recipe.yaml", f"run.dir={name}", "memory.zero_stage=2", "run.save_every=1"]
        )
    rank = os.environ.get("OMPI_COMM_WORLD_RANK", "0")
    Path(f"poisoned-{rank}.json").write_text(json.dumps(outcomes))
