"""What a rank's main thread does in a step, while a GPU would wait: `python benchmarks/main_thread.py [--quick]`.

Seconds of the thread alone (`time.thread_time`), the least of some steps, on one rank: for each further layer of a
model so small that its arithmetic is next to nothing, and for each further parameter of one whose layers are wide.
Beside each stands how many times as long it is as a fixed task of the same run: numpy adds two arrays of a million
numbers.

Ways: every layer recomputed and waited for, with `memory.run_ahead`, with `numerics.compiled_layers`, with both.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.stepping import Case, batches_of, counted_tokens, trainer_of  # noqa: E402

from mlx_empire.comm.solo import SoloCommunicator  # noqa: E402
from mlx_empire.comm.thread import CommThread  # noqa: E402

WAYS: dict[str, dict[str, Any]] = {
    "waiting": {},
    "running ahead": {"run_ahead": True},
    "compiled layers": {"compiled": True},
    "both": {"run_ahead": True, "compiled": True},
}
MILLION = 1 << 20
AIM_LAYER, AIM_PARAMETER = 1e-3, 1e-9  # seconds


def main() -> None:
    """Measure every way, print the table, write the figures."""
    parser = argparse.ArgumentParser(description="The main thread's work for each layer and parameter.")
    parser.add_argument("--quick", action="store_true", help="two steps of small models: does it run?")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "main_thread.json")
    options = parser.parse_args()
    steps, layers, hidden = (2, (2, 4), (64, 128)) if options.quick else (8, (8, 24), (64, 1024))
    task = fixed_task()
    found = {name: measured(way, steps, layers, hidden) for name, way in WAYS.items()}
    table = Table(
        "way", "ms a layer", "x the task", "ns a parameter", "x the task's a number", title=title(task)
    )
    for name, (layer, parameter) in found.items():
        number = task / MILLION
        cells = (
            f"{layer * 1e3:.2f}",
            f"{layer / task:.2f}",
            f"{parameter * 1e9:.2f}",
            f"{parameter / number:.2f}",
        )
        table.add_row(name, *cells)
    Console(highlight=False, width=110).print(table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"task": task, "ways": found}, indent=1) + "\n")


def title(task: float) -> str:
    """What stands over the table."""
    aims = f"aims {AIM_LAYER * 1e3:.0f} ms and {AIM_PARAMETER * 1e9:.0f} ns"
    return f"The main thread's seconds in a step ({aims}); numpy's task took {task * 1e3:.2f} ms"


def fixed_task() -> float:
    """Seconds of the thread in which numpy adds two arrays of a million float32 numbers."""
    a, b, total = (np.ones(MILLION, np.float32) for _ in range(3))

    def once() -> float:
        start = time.thread_time()
        np.add(a, b, out=total)
        return time.thread_time() - start

    return min(once() for _ in range(50))


def measured(
    way: dict[str, Any], steps: int, layers: tuple[int, int], hidden: tuple[int, int]
) -> tuple[float, float]:
    """Seconds of the main thread for one more layer, and for one more parameter."""
    few, deep = (of_step(way, steps, n, hidden[0]) for n in layers)
    narrow, wide = (of_step(way, steps, 4, n) for n in hidden)
    layer = (deep[0] - few[0]) / (layers[1] - layers[0])
    return layer, (wide[0] - narrow[0]) / (wide[1] - narrow[1])


def of_step(way: dict[str, Any], steps: int, layers: int, hidden: int) -> tuple[float, int]:
    """The main thread's seconds of the quickest step, and the model's parameters."""
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "head_dim": 64}
    case = Case(micro_batches=1, rows=1, width=32, config={**sizes, **heads}, **way)
    with CommThread() as thread:
        trainer = trainer_of(case, SoloCommunicator("here"), thread)
        batches = batches_of(case)
        seconds = []
        for step in range(1, steps + 2):  # the first one builds kernels
            start = time.thread_time()
            trainer.train_step(batches, counted_tokens(batches), step, 1e-5)
            seconds.append(time.thread_time() - start)
        return min(seconds[1:]), sum(t.parameters for unit in trainer.spec.units for t in unit.tensors)


if __name__ == "__main__":
    main()
