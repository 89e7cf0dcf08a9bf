"""Does a long run end where a plain loop on torch ends? `make golden`: held-out losses in build/golden.md, and every
step's in build/golden.json.

Ours is `mlx-empire train` as a user types it. The peer is a loop of thirty lines: transformers' model, torch's AdamW,
cross entropy and clipping, a rate written down from its formula. Both start from the same folder, read the same rows in
the same order and are judged on the same held-out rows; the rows come from this package, everything that computes with
them does not. Both compute in float32.

    python benchmarks/golden.py [--model FOLDER] [--steps 300] [--json FILE] [--page FILE]

Exit 1 where the held-out loss at the end differs by more than HELD_OUT_BOUND or one step's loss by more than
STEP_BOUND, relative. Two correct trainers in float32 part slowly: each adds in an order of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_empire.data.batches import MicroBatch, micro_batch, validation_micro_batches
from mlx_empire.data.order import Shuffled
from mlx_empire.data.splits import Splits, load_splits

ROOT = Path(__file__).parents[1]
SMOLLM2 = ROOT / "models" / "smollm2-135m"
SPEECHES = ROOT / "tests" / "fixtures" / "speeches"
ROWS, WIDTH = 4, 64
RATE, WARMUP, FINAL = 1e-4, 10, 0.1
BETAS, EPSILON, DECAY, CLIP = (0.9, 0.95), 1e-8, 0.01, 1.0
EVALUATIONS, HELD_OUT = 12, 16  # how often, and on how many micro-batches
HELD_OUT_BOUND, STEP_BOUND = 1e-3, 1e-2

Curves = dict[str, list[tuple[int, float]]]


def held_out_every(steps: int) -> int:
    """Steps between two evaluations."""
    return max(steps // EVALUATIONS, 1)


def ours(model: Path, steps: int, folder: Path) -> Curves:
    """The losses that the command writes to its metrics: {"loss": [(step, loss)], "held out": [(step, loss)]}."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"run: {{steps: {steps}}}\n")
    words = {
        "model.path": model,
        "model.dtype": "float32",
        "data.path": SPEECHES,
        "data.format": "text",
        "data.sequence_length": WIDTH,
        "batch.global_size": ROWS,
        "batch.micro_size": ROWS,
        "batch.cells": 1,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": RATE,
        "optimizer.betas": list(BETAS),
        "optimizer.eps": EPSILON,
        "optimizer.weight_decay": DECAY,
        "optimizer.clip_norm": CLIP,
        "optimizer.state_bits": 32,
        "schedule.type": "cosine",
        "schedule.warmup": WARMUP,
        "schedule.final": FINAL,
        "run.dir": folder / "run",
        "run.seed": 0,
        "report.log_every": 1,
        "run.eval_every": held_out_every(steps),
        "run.eval_batches": HELD_OUT,
    }
    command = [sys.executable, "-m", "mlx_empire.train", str(recipe), *(f"{k}={v}" for k, v in words.items())]
    subprocess.run(command, check=True, stdout=sys.stderr)
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        "loss": [(r["step"], r["loss"]) for r in records if r.get("loss") is not None],
        "held out": [(r["step"], r["eval_loss"]) for r in records if r.get("eval_loss") is not None],
    }


def rate(step: int, steps: int) -> float:
    """The learning rate of a step that counts from 1, as docs/recipes.md gives it for `cosine`."""
    if step < WARMUP:
        return RATE * step / WARMUP
    progress = (step - WARMUP) / (steps + 1 - WARMUP)
    return RATE * (FINAL + (1 - FINAL) * (1 + math.cos(math.pi * progress)) / 2)


def torch_loop(model: Path, steps: int, splits: Splits) -> Curves:
    """The same, by transformers and torch."""
    import torch
    from transformers import AutoModelForCausalLM

    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY)

    def total(batch: MicroBatch) -> Any:
        logits = network(torch.from_numpy(batch.inputs).long()).logits
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(batch.targets).long().flatten(), reduction="none"
        )
        return (each * torch.from_numpy(batch.mask).flatten()).sum()

    def held_out() -> float:
        assert splits.valid is not None
        with torch.no_grad():
            batches = list(validation_micro_batches(splits.valid, ROWS, HELD_OUT))
            return float(sum(total(b) for b in batches)) / float(sum(b.mask.sum() for b in batches))

    curves: Curves = {"loss": [], "held out": [(0, held_out())]}
    order = Shuffled(len(splits.train), 0)
    for step in range(1, steps + 1):
        batch = micro_batch(splits.train, order, step - 1, 0, global_size=ROWS, micro_size=ROWS)
        loss = total(batch) / float(batch.mask.sum())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        curves["loss"].append((step, float(loss)))
        if step % held_out_every(steps) == 0 or step == steps:
            curves["held out"].append((step, held_out()))
    return curves


def differences(a: list[tuple[int, float]], b: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """(step, how far `a` is from `b`, relative) of the same steps; AssertionError where they are not the same."""
    assert [step for step, _ in a] == [step for step, _ in b], "both curves have the same steps"
    return [(step, abs(x - y) / abs(y)) for (step, x), (_, y) in zip(a, b, strict=True)]


def page(model: str, steps: int, found: dict[str, Curves], seconds: dict[str, float]) -> str:
    """The page: the settings, the table of held-out losses, the largest difference between evaluations."""
    theirs, mine = found["torch"], found["mlx-empire"]
    by_step = differences(mine["loss"], theirs["loss"])
    lines = [
        "# A golden run",
        "",
        "`make golden` writes this page.",
        "",
        f"{model}, {steps} steps of {ROWS} rows of {WIDTH} tokens of speeches, float32, AdamW (rate {RATE:g}, betas "
        f"{BETAS[0]} and {BETAS[1]}, decay {DECAY}), cosine after {WARMUP} steps to {FINAL} of the rate, norm clipped "
        f"at {CLIP:g}: `mlx-empire train` on one process, and a plain loop with transformers' model and torch's AdamW "
        f"on the same rows. Held out: at most {HELD_OUT * ROWS} rows of other speeches.",
        "",
        "| step | held out, ours | held out, torch | largest difference of a step's loss since the row before |",
        "|---:|---:|---:|---:|",
    ]
    before = 0
    for (step, x), (_, y) in zip(mine["held out"], theirs["held out"], strict=True):
        part = [d for at, d in by_step if before < at <= step]
        lines.append(f"| {step} | {x:.5f} | {y:.5f} | {f'{max(part):.1e}' if part else ''} |")
        before = step
    last = differences(mine["held out"], theirs["held out"])[-1][1]
    lines += [
        "",
        f"The held-out losses at the end differ by {last:.1e} of torch's, no step's training loss by more than "
        f"{max(d for _, d in by_step):.1e}. Wall time on {os.cpu_count()} {platform.machine()} cores: "
        f"{seconds['mlx-empire']:.0f} s and {seconds['torch']:.0f} s, which compares no speeds: "
        "docs/peers.md does.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=SMOLLM2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path, help="keep every step's loss here")
    parser.add_argument("--page", type=Path, help="write the page here")
    options = parser.parse_args()
    splits = load_splits(
        path=SPEECHES,
        format="text",
        sequence_length=WIDTH,
        tokenizer_folder=options.model,
        vocab_size=json.loads((options.model / "config.json").read_text())["vocab_size"],
    )
    found: dict[str, Curves] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        arms: dict[str, Callable[[], Curves]] = {
            "mlx-empire": lambda: ours(options.model.resolve(), options.steps, Path(folder)),
            "torch": lambda: torch_loop(options.model, options.steps, splits),
        }
        for name, train in arms.items():
            start = time.monotonic()
            found[name] = train()
            seconds[name] = time.monotonic() - start
    if options.json:
        options.json.write_text(json.dumps(found) + os.linesep)
    text = page(options.model.name, options.steps, found, seconds)
    print(text)
    if options.page:
        options.page.write_text(text, encoding="utf-8")
    ends = differences(found["mlx-empire"]["held out"], found["torch"]["held out"])[-1][1]
    steps = max(d for _, d in differences(found["mlx-empire"]["loss"], found["torch"]["loss"]))
    return int(ends > HELD_OUT_BOUND or steps > STEP_BOUND)


if __name__ == "__main__":
    sys.exit(main())
