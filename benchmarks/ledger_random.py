"""How far the ledger is off on settings that nobody chose: `python benchmarks/ledger_random.py --seed 13 --count 60`.

Families, sizes, shape of the step, ranks, ZeRO stage, tuning, optimizer, tail and dtype are drawn by the seed
(`tests/support/random_settings.py`); each setting trains two steps and its measured peak is held against the
prediction, rank by rank. A line for each, then the worst, the median and the lowest. `--otherwise`: the same settings
running ahead, with packed rows or with long ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.mpi import run_ranks  # noqa: E402
from support.random_settings import drawn, drawn_otherwise, title  # noqa: E402

AT_ONCE = 4  # settings that one launch measures


def measured(settings: list[tuple[int, dict[str, Any]]]) -> list[tuple[float, str]]:
    """(relative error of the worst rank, the setting) of each setting; printed as they come."""
    found: list[tuple[float, str]] = []
    for ranks in sorted({ranks for ranks, _ in settings}):
        cases = {title(r, fields): fields for r, fields in settings if r == ranks}
        names = list(cases)
        for start in range(0, len(names), AT_ONCE):
            chosen = {name: cases[name] for name in names[start : start + AT_ONCE]}
            reports = run_ranks(ranks, "tests/engine/peak_worker.py", [json.dumps(chosen)], timeout=900)
            for name in chosen:
                errors = [one[name]["predicted"] / one[name]["measured"] - 1 for one in reports]
                worst = max(errors, key=abs)
                size = reports[0][name]["measured"] / 2**20
                print(
                    f"{100 * worst:+5.1f} %  {size:6.1f} MiB  {reports[0][name]['phase']:8}  {name}",
                    flush=True,
                )
                found.append((worst, name))
    return found


def main() -> None:
    """Print every setting and the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--otherwise", action="store_true")
    given = parser.parse_args()
    draw = drawn_otherwise if given.otherwise else drawn
    errors = [error for error, _ in measured(draw(given.seed, given.count))]
    print(
        f"seed {given.seed}, {len(errors)} settings: worst {100 * max(errors, key=abs):+.1f} %, "
        f"median {100 * median(map(abs, errors)):.1f} %, lowest {100 * min(errors):+.1f} %, "
        f"highest {100 * max(errors):+.1f} %"
    )


if __name__ == "__main__":
    main()
