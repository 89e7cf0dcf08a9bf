"""What only a true layer can show: one of the recipe's model, at its full width, trained over all machines.

`run.unit` does the work on every rank and writes `unit.json`; here it is started and becomes rows: measured peak beside
the planned one, seconds, and the longest evaluation. `mlx-empire capacity --unit FILE` plans with its speed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from mlx_empire.cluster.hostfile import Cluster
from mlx_empire.doctor.findings import Findings
from mlx_empire.progress import LAUNCHER_VARIABLE
from mlx_empire.run.mpirun import worker_line

FILE = "unit.json"


def train_one_layer(
    hostfile: Path,
    recipe: Path,
    folder: Path,
    cluster: Cluster,
    environment: Mapping[str, str],
    interface: str | None,
    findings: Findings,
) -> int:
    """Rows on one true layer; its exit code: 3 where a machine needs more memory than is planned."""
    out = folder / FILE
    out.unlink(missing_ok=True)
    words = [str(recipe), "--out", str(out), "--hosts", str(hostfile)]
    program = [sys.executable, "-m", "mlx_empire.run.unit", *words]
    alone = {
        name: value for name, value in environment.items() if name != LAUNCHER_VARIABLE
    }  # nobody listens
    line = worker_line(hostfile, cluster, program, alone, interface)
    # mpirun's output would mix with --json's.
    code = subprocess.run(line, env=alone, stdout=sys.stderr, check=False).returncode
    findings.add("one true layer", str(hostfile), f"exit code {code}", code == 0)
    for one in json.loads(out.read_text())["ranks"] if out.exists() else []:
        peaks = f"{one['peak_bytes'] / 2**30:.3f} GiB of {one['predicted_peak_bytes'] / 2**30:.3f} planned"
        findings.add("its memory", one["host"], peaks, code == 0)
        seconds = ", ".join(f"{part} {value:.3f}" for part, value in one["seconds"].items())
        findings.add("its seconds", one["host"], seconds)
        longest = f"{one['longest']}: {one['longest_seconds']:.3f} s"
        findings.add("the longest evaluation", one["host"], longest)
    return code
