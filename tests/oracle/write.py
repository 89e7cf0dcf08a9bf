"""Write the oracle: `python tests/oracle/write.py`. It was run once, on commit 008befe, before the step became a list.

What it wrote is what the code did then. Whoever changes the code reads it and does not write it again.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from oracle.arithmetic import fingerprint  # noqa: E402
from oracle.models import model_plans  # noqa: E402
from oracle.plans import case_of, plan_of  # noqa: E402
from oracle.settings import RANKS, SETTINGS  # noqa: E402
from support.mpi import run_ranks  # noqa: E402

ORACLE = TESTS / "fixtures" / "oracle.json.gz"


def recorded() -> dict[str, Any]:
    """Everything that is written: by number of ranks and setting its bits and its plan; plans of large models."""
    bits, plans = {}, {}
    for ranks in RANKS:
        found = run_ranks(ranks, "tests/oracle/worker.py", [json.dumps(list(SETTINGS))], timeout=1800)[0]
        bits[str(ranks)] = found
        plans[str(ranks)] = {n: plan_of(case_of(f, ranks), ranks) for n, f in SETTINGS.items()}
        print(f"{ranks} ranks: {len(found)} settings", flush=True)
    return {"arithmetic": fingerprint(), "bits": bits, "plans": plans, "models": model_plans()}


if __name__ == "__main__":
    ORACLE.write_bytes(gzip.compress(json.dumps(recorded(), sort_keys=True).encode(), 9, mtime=0))
