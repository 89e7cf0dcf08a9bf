"""How many bytes the optimizer's update moves between the last cache and memory, counted by a simulated cache.

Valgrind runs the same update on the CPU with a write-back cache of a given size; a machine's own counters are rarely
within a program's reach. Counted per parameter, as the difference between runs of more and of fewer steps: lines that
a load fetched, changed lines that were written back, and lines that were fetched only to be overwritten, which a GPU
need not do. What must move is states and weights read and written, and the gradient read. The last column counts what
passes the first cache, 32 KiB: the arrays between one kernel and the next are in it.

    python benchmarks/optim_traffic.py [--caches 32 96] [--millions 16] [--chunk 2097152]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import mlx.core as mx  # noqa: E402
from optim_steps import OURS, STOCK, ours, stock  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402

from mlx_empire.plan.shards import CHUNK_ELEMENTS  # noqa: E402

ARMS = (OURS, STOCK)
FEW, MORE = 1, 3  # steps
LINE = 64
MIB = 1 << 20


def run(arm: str, elements: int, chunk: int, steps: int) -> float:
    """Take steps, in the simulated machine; returns the bytes per parameter that must move."""
    if arm == STOCK:
        step, necessary = stock(elements, False)
    else:
        step, necessary = ours(elements, {"state_bits": 8}, chunk)
    for _ in range(steps):
        step()
    return necessary


def events(arm: str, elements: int, chunk: int, cache: int, steps: int) -> dict[str, int]:
    """Callgrind's counts for a run of `steps` with a last cache of `cache` MiB."""
    ways = 16 if cache & (cache - 1) == 0 else 12  # the number of sets must be a power of two
    simulated = [
        "valgrind", "--tool=callgrind", "--cache-sim=yes", "--simulate-wb=yes", "--callgrind-out-file=/dev/null",
        "--D1=32768,8,64", f"--LL={cache * MIB},{ways},{LINE}",
    ]  # fmt: skip
    asked = [sys.executable, __file__, "--inside", arm, str(elements), str(chunk), str(steps)]
    done = subprocess.run([*simulated, *asked], capture_output=True, text=True)
    lines = {
        line.split(":")[0].split()[-1]: line.split(":")[1] for line in done.stderr.splitlines() if ":" in line
    }
    if done.returncode or "Collected" not in lines:
        raise SystemExit(f"valgrind did not run: {done.stderr.strip().splitlines()[-1]}")
    return dict(zip(lines["Events"].split(), map(int, lines["Collected"].split()), strict=True))


def moved(arm: str, elements: int, chunk: int, cache: int) -> dict[str, float]:
    """Bytes per parameter and step."""
    few, more = (events(arm, elements, chunk, cache, steps) for steps in (FEW, MORE))
    each = {name: (more[name] - few[name]) * LINE / elements / (MORE - FEW) for name in few}
    return {
        "read": each["DLmr"],
        "written": each["ILdmr"] + each["DLdmr"] + each["DLdmw"],
        "overwritten": each["DLmw"],
        "first cache": each["D1mr"] + each["D1mw"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--caches", type=int, nargs="+", default=[32, 96], help="the last cache, in MiB")
    parser.add_argument("--millions", type=int, default=16, help="parameters, in 2^20")
    parser.add_argument("--chunk", type=int, default=CHUNK_ELEMENTS, help="parameters updated at once")
    parser.add_argument("--inside", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        arm, *numbers = options.inside
        run(arm, *map(int, numbers))
        return 0
    if shutil.which("valgrind") is None:
        raise SystemExit("valgrind is not installed: apt-get install valgrind")
    if mx.default_device().type != mx.DeviceType.cpu:
        raise SystemExit("a simulated cache sees the CPU only; run this on a machine where MLX uses the CPU")
    elements = options.millions * MIB
    table = Table()
    for name in (
        "update",
        "cache",
        "must move",
        "read",
        "written back",
        "moved",
        "of necessary",
        "overwritten",
        "past 32 KiB",
    ):
        table.add_column(name, justify="left" if name == "update" else "right")
    for arm, cache in track([(a, c) for c in options.caches for a in ARMS], "counting"):
        necessary = run(arm, 64 * 64, 64 * 64, 0)
        each = moved(arm, elements, options.chunk, cache)
        total = each["read"] + each["written"]
        figures = (necessary, each["read"], each["written"], total)
        table.add_row(
            arm, f"{cache} MiB", *(f"{x:.1f}" for x in figures), f"{total / necessary:.2f} x",
            f"{each['overwritten']:.1f}", f"{each['first cache']:.0f}",
        )  # fmt: skip
    Console(width=130).print(
        table, f"bytes per parameter; {options.millions} x 2^20 of them, chunks of {options.chunk:,}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
