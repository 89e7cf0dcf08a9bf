"""How long a capacity report takes, and how much memory: `python benchmarks/capacity_report.py`.

Each command is started anew, as a user does, so importing MLX and mlx-lm counts. The best of a few runs, against
2 s for a dense model, 5 s for Llama 4 Scout, and 500 MB. What is printed is thrown away; `--check` makes a missed
target the exit code 1. On a busy machine the processor time says more.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCOUT = ["recipes/scout.yaml", "--hosts", "hosts/empire.txt"]
MEGABYTE = 10**6
MOST_BYTES = 500 * MEGABYTE
CASES: tuple[tuple[str, list[str], float | None], ...] = (
    ("Llama 3.1 8B, report", [*SCOUT, "model.path=llama-3.1-8b", "model.architecture=null"], 2.0),
    ("Scout, report", SCOUT, 5.0),
    ("Scout, ladder", [*SCOUT, "--ladder"], None),
    ("Scout, daughters", [*SCOUT, "--daughters"], None),
    ("catalog, matrix", [*SCOUT, "--matrix"], None),
)


def measure(arguments: list[str]) -> tuple[float, float, int]:
    """(seconds, seconds of processor time, largest resident bytes) of one run of the command."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_empire.capacity", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    code = process.returncode = os.waitstatus_to_exitcode(status)
    if code not in (0, 3):
        assert process.stderr is not None
        raise SystemExit(f"{' '.join(arguments)}: exit code {code}: {process.stderr.read().decode()}")
    return (
        seconds,
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    )


def main() -> int:
    """Measure and print a line for each command."""
    parser = argparse.ArgumentParser(description="Seconds and memory of a capacity report.")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="exit code 1 when a target is missed")
    options = parser.parse_args()
    missed = False
    for name, arguments, allowed in CASES:
        runs = [measure(arguments) for _ in range(options.runs if allowed is not None else 1)]
        seconds, processor, memory = min(r[0] for r in runs), min(r[1] for r in runs), max(r[2] for r in runs)
        late = allowed is not None and seconds > allowed
        missed |= late or memory > MOST_BYTES
        target = f"of {allowed:.0f} s" if allowed is not None else ""
        verdict = "MISSED" if late or memory > MOST_BYTES else "ok"
        times = f"{seconds:6.2f} s {target:7} ({processor:5.2f} s of processor time)"
        print(f"{name:22} {times} {memory / MEGABYTE:5.0f} MB of 500   {verdict}", flush=True)
    return int(missed and options.check)


if __name__ == "__main__":
    sys.exit(main())
