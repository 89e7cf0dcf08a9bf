"""What keeping results of recomputed layers saves: `python benchmarks/kept.py [--layers ...] [--steps ...]`.

`--layers`: forward and vjp of one layer of SmolLM2's shape, and of a mixture that nobody tuned to, on one row of so
many tokens, at random weights in float32: nothing kept, half of the products (in long rows attention), and all.
`--steps`: whole steps of SmolLM2's shape on one process. The ways follow one another in one process, and are repeated;
CPU seconds are the least and the ratio is the median of those to nothing kept of the same round. Of steps also the peak
is printed, beside the ledger's; their losses and gradient norms have to be equal to the last bit.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.stepping import Case, batches_of, counted_tokens, optimizer_of, trainer_of, weights_of  # noqa: E402
from support.tiny_models import SMOLLM2  # noqa: E402

from mlx_empire.comm.solo import SoloCommunicator  # noqa: E402
from mlx_empire.comm.thread import CommThread  # noqa: E402
from mlx_empire.model.attention.patterns import Pattern  # noqa: E402
from mlx_empire.model.attention.segments import Kernels, attending  # noqa: E402
from mlx_empire.model.kept import ATTENTION, Calls, Kept, Noting, Reusing, calling  # noqa: E402
from mlx_empire.plan.memory import ledger  # noqa: E402
from mlx_empire.plan.work import step_flops  # noqa: E402

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
LAYERS = {
    "smollm2": Case("llama", config={**SMOLLM2, "num_hidden_layers": 1, "vocab_size": 256}),
    "mixture": Case("qwen3_moe", config={**MIXTURE, "num_hidden_layers": 1, "vocab_size": 256}),
}
PRODUCTS = {"smollm2": (0, 1, 2, 3, 4, 5), "mixture": (0, 1, 2, 3, 4, 5, 6, 7)}
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


def layer_step(layer: nn.Module, x: mx.array, kept: Sequence[int]) -> float:
    """CPU seconds of forward and vjp, as the engine runs them on one micro-batch."""
    names, arrays = zip(*tree_flatten(layer.trainable_parameters()), strict=True)

    def call(x: mx.array, calls: Calls | None) -> mx.array:
        with ExitStack() as entered:
            kernels = Kernels.here() if calls is None else replace(Kernels.here(), in_blocks=calls.attention)
            if calls is not None:
                entered.enter_context(calling(calls.product))
            if x.shape[1] > kernels.short:
                entered.enter_context(attending(Pattern(), kernels))
            result: mx.array = layer(x, mask="causal")
        return result

    def run(x: mx.array, *given: mx.array) -> mx.array:
        layer.load_weights(list(zip(names, given, strict=True)), strict=False)
        return call(x, Reusing(noted) if kept else None)

    started = time.process_time()
    noting = Noting(kept)
    y = call(x, noting if kept else None)
    noted = noting.kept
    mx.eval(y, noted.arrays())
    _, gradients = mx.vjp(run, [x, *arrays], [y])
    del noting
    noted = Kept()
    mx.eval(gradients)
    layer.load_weights(list(zip(names, arrays, strict=True)), strict=False)
    return time.process_time() - started


def compare_layers(asked: str, rounds: int, console: Console) -> list[dict[str, Any]]:
    """The lines of one layer, asked for as `smollm2-256`."""
    name, tokens = asked.rsplit("-", 1)
    case = replace(LAYERS[name], width=int(tokens))
    model, _, _ = weights_of(case)
    layer, products = model.layers[0], PRODUCTS[name]
    x = mx.random.normal((1, case.width, case.config["hidden_size"]))
    mx.eval(x)
    long = case.width > Kernels.here().short
    ways = {
        "nothing": (),
        "half": (ATTENTION,) if long else products[:3],
        "all": (*[ATTENTION][:long], *products),
    }
    layer_step(layer, x, ways["all"])
    found = {way: [] for way in ways}
    for _ in range(rounds):
        for way, kept in ways.items():
            found[way].append(layer_step(layer, x, kept))
    table = Table(f"a layer, {asked}", "least CPU s", "x", "rounds from", "to")
    lines = []
    for way, seconds in found.items():
        ratios = [own / plain for own, plain in zip(seconds, found["nothing"], strict=True)]
        least = min(seconds)
        table.add_row(way, f"{least:.3f}", *(f"{r:.3f}" for r in (median(ratios), min(ratios), max(ratios))))
        lines.append(
            {"layer": asked, "kept": way, "seconds": least, "ratios": ratios, "ratio": median(ratios)}
        )
    console.print(table)
    return lines


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
    parser.add_argument("--layers", nargs="*", default=["smollm2-256", "smollm2-2048", "mixture-512"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", nargs="*", default=[], choices=SETTINGS)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--depth", type=int, help="layers of the steps' model, in place of its own number")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "kept.json")
    options = parser.parse_args()
    console = Console(highlight=False, width=110)
    mx.random.seed(0)
    found: list[dict[str, Any]] = []
    for name in options.layers:
        found += compare_layers(name, options.rounds, console)
    for name in options.steps:
        case = replace(SETTINGS[name], stage=2, tied="smollm2" in name, by_pattern=True)
        if options.depth:
            case = replace(case, config={**case.config, "num_hidden_layers": options.depth})
        found += compare(name, case, options.pairs, console)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
