"""Attention by pattern against MLX's own with a mask: `python benchmarks/attention.py [--lengths 1024 2048 4096]`.

Forward and vjp of 9 heads in 3 groups of 64 channels in float32, on one row: causal, eight documents, a window of an
eighth, chunks of a quarter. Both ways run in one process, one right after the other, MLX's first; ratios are of CPU
time and of the peak above what was there before. Then whole steps of SmolLM2's shape (`--steps`, tokens x layers): the
measured peak beside the ledger's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.mpi import run_ranks  # noqa: E402
from support.tiny_models import SMOLLM2  # noqa: E402

from mlx_empire.model.attention.patterns import Pattern, cuts_of  # noqa: E402
from mlx_empire.model.attention.segments import Kernels, attend  # noqa: E402

HEADS, GROUPS, DEPTH = 9, 3, 64
PLAIN = mx.fast.scaled_dot_product_attention
SHAPE = {**SMOLLM2, "max_position_embeddings": 32768}
Attention = Callable[[mx.array, mx.array, mx.array], mx.array]


def patterns(length: int) -> dict[str, tuple[Pattern, Any]]:
    """By name the pattern and MLX's mask for it."""
    documents = (np.arange(length) * 8 // length)[None]
    packed = Pattern(cuts=cuts_of(documents))
    visible = Pattern().visible(0, length, length) & (documents[0][:, None] == documents[0][None])
    found: dict[str, tuple[Pattern, Any]] = {
        "causal": (Pattern(), "causal"),
        "8 documents": (packed, mx.array(visible)),
    }
    for name, pattern in {
        "window S/8": Pattern(window=length // 8),
        "chunks S/4": Pattern(chunk=length // 4),
    }.items():
        found[name] = pattern, mx.array(pattern.visible(0, length, length))
    return found


def cost(attention: Attention, arrays: list[mx.array]) -> tuple[float, int]:
    """(CPU seconds, bytes of the peak) of forward and vjp, each by itself."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    started = time.process_time()
    mx.eval(attention(*arrays[:3]))
    _, gradients = mx.vjp(lambda *given: [attention(*given)], arrays[:3], arrays[3:])
    mx.eval(gradients)
    return time.process_time() - started, mx.get_peak_memory() - before


def compare(length: int, console: Console) -> list[dict[str, Any]]:
    """A line for each pattern."""
    shapes = [(1, heads, length, DEPTH) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    arrays = [mx.random.normal(shape) for shape in shapes]
    mx.eval(arrays)
    table = Table("S", "pattern", "MLX CPU s", "ours", "ratio", "MLX peak MB", "ours", "ratio")
    found = []
    for name, (pattern, mask) in patterns(length).items():
        mx.eval([mask] if isinstance(mask, mx.array) else [])

        def by_mask(q: mx.array, k: mx.array, v: mx.array, mask: Any = mask) -> mx.array:
            return PLAIN(q, k, v, scale=DEPTH**-0.5, mask=mask)

        def by_pattern(q: mx.array, k: mx.array, v: mx.array, pattern: Pattern = pattern) -> mx.array:
            return attend(q, k, v, scale=DEPTH**-0.5, pattern=pattern, kernels=Kernels.here(), plain=PLAIN)

        (theirs, their_peak), (ours, our_peak) = cost(by_mask, arrays), cost(by_pattern, arrays)
        line = [f"{theirs:.2f}", f"{ours:.2f}", f"{ours / theirs:.2f}"]
        line += [f"{their_peak / 1e6:.0f}", f"{our_peak / 1e6:.0f}", f"{our_peak / their_peak:.3f}"]
        table.add_row(str(length), name, *line)
        found.append(
            {"length": length, "pattern": name, "time": ours / theirs, "peak": our_peak / their_peak}
        )
    console.print(table)
    return found


def step(tokens: int, layers: int, console: Console) -> dict[str, Any]:
    """A step of SmolLM2's shape on one row, at random weights, every layer recomputed."""
    config = {**SHAPE, "num_hidden_layers": layers}
    case = {"family": "llama", "config": config, "tied": True, "width": tokens, "rows": 1, "micro_batches": 1}
    name = f"{layers} layers, {tokens} tokens"
    fields = json.dumps({name: {**case, "stage": 2, "by_pattern": True}})
    (report,) = run_ranks(1, "tests/engine/peak_worker.py", [fields], timeout=6 * 3600)
    measured, predicted = (report[name][key] for key in ("measured", "predicted"))
    console.print(
        f"{name}: peak {measured / 1e9:.2f} GB, ledger {predicted / 1e9:.2f} GB "
        f"({100 * (predicted / measured - 1):+.1f} %, {report[name]['phase']})"
    )
    return {"tokens": tokens, "layers": layers, "measured": measured, "predicted": predicted}


def main() -> None:
    """Print the tables and write the results."""
    parser = argparse.ArgumentParser(description="Attention by pattern against MLX's own.")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048, 4096])
    parser.add_argument(
        "--steps", nargs="*", default=["8192x2"], metavar="TOKENSxLAYERS", help="also 32768x2 and 8192x30"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "attention.json")
    options = parser.parse_args()
    console = Console(highlight=False, width=110)
    mx.random.seed(0)
    found: list[dict[str, Any]] = []
    for length in options.lengths:
        found += compare(length, console)
    for tokens, layers in (map(int, asked.split("x")) for asked in options.steps):
        found.append(step(tokens, layers, console))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
