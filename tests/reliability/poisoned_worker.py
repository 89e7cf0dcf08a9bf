"""Run by mpirun: one run after the other, each with a NaN of its own; what came of them, and whether fault injection
was imported, which nothing here asked for."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from support.poison import poisoned
from train.many_commands import outcome

CASES = {
    "loss": poisoned("forward", step=2, rank=1),
    "gradient": poisoned("backward", step=2, rank=0),
    "transient": poisoned("backward", step=2, rank=1, once=True),
}

if __name__ == "__main__":
    outcomes = {}
    for name, case in CASES.items():
        with case:
            outcomes[name] = outcome(
                ["recipe.yaml", f"run.dir={name}", "memory.zero_stage=2", "run.save_every=1"]
            )
    rank = os.environ.get("OMPI_COMM_WORLD_RANK", "0")
    imported = "mlx_empire.faults" in sys.modules
    Path(f"poisoned-{rank}.json").write_text(json.dumps({**outcomes, "faults imported": imported}))
