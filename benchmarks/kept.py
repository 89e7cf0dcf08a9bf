"""What keeping results of recomputed layers saves and costs: `python benchmarks/kept.py [--settings ...] [--pairs 3]`.

Steps of SmolLM2's shape at random weights in float32 on one process, of 256 and of 2,048 tokens a row; `--settings`
also has a mixture. In each pair all layers are recomputed with nothing kept, and with a half and all of what can be
(what saves most operations a byte first), one right after the other in one process. Printed are CPU seconds of a step
and the ratio to nothing kept of the same pair; the peak above what was there before; and what the plan counts:
operations, and the ledger's peak. Losses and gradient norms have to be equal to the last bit.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.stepping import Case, batches_of, counted_tokens, optimizer_of, trainer_of  # noqa: E402

from mlx_empire.comm.solo import SoloCommunicator  # noqa: E402
from mlx_empire.comm.thread import CommThread  # noqa: E402
from mlx_empire.plan.memory import ledger  # noqa: E402
from mlx_empire.plan.work import step_flops  # noqa: E402

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
}
MIXTURE = {
    "hidden_size": 384,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "moe_intermediate_size": 512,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 16384,
}
SETTINGS = {
    "smollm2-256": Case(
        "llama", config={**SMOLLM2, "num_hidden_layers": 30}, width=256, rows=1, micro_batches=2
    ),
    "smollm2-2048": Case(
        "llama", config={**SMOLLM2, "num_hidden_layers": 30}, width=2048, rows=1, micro_batches=1
    ),
    "mixture-512": Case(
        "qwen3_moe", config={**MIXTURE, "num_hidden_layers": 8}, width=512, rows=1, micro_batches=4
    ),
}
PARTS = (0.0, 0.5, 1.0)


def step(case: Case) -> dict[str, Any]:
    """CPU seconds and the peak of a step; what it gave; what the plan counts."""
    gc.collect()
    mx.clear_cache()
    comm = SoloCommunicator("benchmark")
    with CommThread() as thread:
        trainer = trainer_of(case, comm, thread)
        mx.reset_peak_memory()
        batches = batches_of(case)
        started = time.process_time()
        result = trainer.train_step(batches, counted_tokens(batches), 1, case.learning_rate)
        seconds = time.process_time() - started
        print(f"  {case.kept:.0%} kept: {seconds:.2f} CPU seconds", file=sys.stderr, flush=True)
        plan, work = trainer.store.plan, trainer.work
        return {
            "seconds": seconds,
            "peak": mx.get_peak_memory(),
            "ledger": ledger(trainer.spec, plan, work, 0, optimizer_of(case).state_bytes).peak,
            "operations": step_flops(trainer.spec, plan, work, 0),
            "gave": (result.loss, result.gradient_norm),
        }


def compare(name: str, case: Case, pairs: int, console: Console) -> list[dict[str, Any]]:
    """The lines of a setting."""
    step(case)  # MLX compiles its kernels
    found = [[step(replace(case, kept=part)) for part in PARTS] for _ in range(pairs)]
    table = Table(name, "CPU s", "x, by pair", "median", "operations", "peak MB", "ledger")
    lines = []
    for i, part in enumerate(PARTS):
        ones = [pair[i] for pair in found]
        if any(one["gave"] != pair[0]["gave"] for one, pair in zip(ones, found, strict=True)):
            sys.exit(f"{name}: with {part:.0%} kept a step gives other bits")
        ratios = [one["seconds"] / pair[0]["seconds"] for one, pair in zip(ones, found, strict=True)]
        line = {
            "setting": name,
            "kept": part,
            "seconds": [round(one["seconds"], 2) for one in ones],
            "ratios": ratios,
            "ratio": median(ratios),
            "operations": ones[0]["operations"] / found[0][0]["operations"],
            "peak": ones[0]["peak"],
            "ledger": ones[0]["ledger"] / ones[0]["peak"] - 1,
        }
        lines.append(line)
        table.add_row(
            f"{part:.0%} kept",
            ", ".join(map(str, line["seconds"])),
            ", ".join(f"{ratio:.3f}" for ratio in ratios),
            f"{line['ratio']:.3f}",
            f"{line['operations']:.3f}",
            f"{line['peak'] / 1e6:.0f}",
            f"{100 * line['ledger']:+.1f} %",
        )
    console.print(table)
    return lines


def main() -> None:
    """Print the tables and write the results."""
    parser = argparse.ArgumentParser(description="Recomputation with results kept, against without.")
    parser.add_argument("--settings", nargs="*", default=["smollm2-256", "smollm2-2048"], choices=SETTINGS)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--layers", type=int, help="of each setting, in place of its own")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "kept.json")
    options = parser.parse_args()
    console = Console(highlight=False, width=110)
    found: list[dict[str, Any]] = []
    for name in options.settings:
        case = replace(SETTINGS[name], stage=2, tied="smollm2" in name, by_pattern=True)
        if options.layers:
            case = replace(case, config={**case.config, "num_hidden_layers": options.layers})
        found += compare(name, case, options.pairs, console)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
