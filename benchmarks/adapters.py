"""LoRA as fast as `mlx_lm.lora`, in less memory? `make bench`, or `python benchmarks/adapters.py`.

SmolLM2-135M in float32 on one machine, rank 8 on every linear layer. A pair is one run of ours and one of mlx-lm's,
one right after the other (the order alternates), with the same rows, first values and optimizer, checked by equal
losses; a ratio is taken inside a pair, and what counts is the median over the pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from launching import ROOT, Run, Setting, launch, our_run, peer_run, same_work, write_rows
from rich.console import Console
from rich.table import Table

MODEL = ROOT / "models" / "smollm2-135m"
TINY = ROOT / "tests" / "fixtures" / "tiny-llama-260k"
RESULTS = ROOT / "build" / "adapters.json"
RANK, LEARNING_RATE = 8, 1e-4
LEAST_RATIO = 1.0  # targets per second, ours over mlx-lm's


@dataclass(frozen=True)
class Case:
    """What both are asked for: whether layers are recomputed, bits of the base (0: as it is), rows of a step, and
    their most tokens: MLX multiplies packed matrices slowly on a CPU.
    """

    name: str
    checkpointing: bool
    bits: int = 0
    rows: int = 2
    widest: int = 1 << 20


CASES = (
    Case("LoRA, recomputed", True),
    Case("LoRA, nothing recomputed", False),
    Case("QLoRA 4 bit, recomputed", True, bits=4, rows=1, widest=64),
)


def main() -> int:
    """Measure, print the table, write the results; 1 with --check where a target is missed."""
    parser = argparse.ArgumentParser(description="LoRA against mlx_lm.lora.")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model: does it run? Its ratios mean nothing"
    )
    parser.add_argument(
        "--pairs", type=int, default=0, help="pairs of runs for each case (default 3, quick 1)"
    )
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a run, after one of warm-up")
    parser.add_argument("--width", type=int, default=256, help="tokens of a row")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="exit code 1 where a target is missed")
    options = parser.parse_args()
    console = Console(highlight=False, width=110)
    model, width = (TINY, 64) if options.quick else (options.model.resolve(), options.width)
    if not (model / "config.json").exists():
        sys.exit(f"benchmarks: no model in {model}; run `make quickstart` once, or give --model")
    pairs: dict[str, list[tuple[Run, Run]]] = {case.name: [] for case in CASES}
    load = os.getloadavg()[0]
    for number in range(options.pairs or (1 if options.quick else 3)):
        for case in CASES:
            setting = Setting(model, 1, case.rows, min(width, case.widest), 1, options.steps, LEARNING_RATE)
            pair = measure(case, setting, swapped=number % 2 == 1)
            if not same_work(*pair):
                sys.exit(f"benchmarks: {case.name}: losses {pair[0].losses}, but mlx-lm's {pair[1].losses}")
            pairs[case.name].append(pair)
            ratio = pair[0].tokens_per_second / pair[1].tokens_per_second
            memory = pair[0].peak_bytes / pair[1].peak_bytes
            console.print(f"{case.name}: targets/s {ratio:.3f} x mlx-lm's, peak memory {memory:.3f} x")
    reached = [report(case, pairs[case.name]) for case in CASES]
    console.print(shown(pairs, f"{model.name}, {width} tokens a row, load {load:.1f} at the start"))
    results = {name: [[asdict(run) for run in pair] for pair in found] for name, found in pairs.items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps({"load": load, "model": model.name, "width": width, "pairs": results}, indent=1)
    )
    return int(options.check and not all(reached))


def measure(case: Case, setting: Setting, *, swapped: bool) -> tuple[Run, Run]:
    """(ours, mlx-lm's), run one right after the other."""
    with tempfile.TemporaryDirectory(prefix="bench-rows-") as folder:
        data = Path(folder)
        write_rows(setting, data)
        if swapped:
            peer = run_peer(case, setting, data)
            return run_ours(case, setting, data), peer
        return run_ours(case, setting, data), run_peer(case, setting, data)


def run_ours(case: Case, setting: Setting, data: Path) -> Run:
    """The command itself; figures from its metrics.jsonl."""
    tuning = {"type": "qlora" if case.bits else "lora", "rank": RANK}
    recipe = {
        "model": {"path": str(setting.model), "dtype": "float32"},
        "tuning": {**tuning, **({"bits": case.bits} if case.bits else {})},
        "data": {"path": str(data), "format": "tokens", "sequence_length": setting.width},
        "batch": {"global_size": setting.rows, "micro_size": setting.rows},
        "optimizer": {"learning_rate": LEARNING_RATE, "clip_norm": None},  # mlx-lm's trainer does not clip
        "memory": {"gradient_checkpointing": case.checkpointing},
        "report": {"progress": "never"},
    }
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        run_dir, file = Path(folder) / "run", Path(folder) / "recipe.yaml"
        file.write_text(json.dumps({**recipe, "run": {"dir": str(run_dir), "steps": setting.steps}}))
        launch([sys.executable, "-u", "-m", "mlx_empire.train", str(file)], Path(folder))
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return our_run("mlx_empire", records, setting)


def run_peer(case: Case, setting: Setting, data: Path) -> Run:
    """mlx-lm's layers and trainer; figures as that trainer reports them."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        out = Path(folder)
        arguments = {
            "model": setting.model,
            "data": data / "train.jsonl",
            "rows": setting.rows,
            "width": setting.width,
            "steps": setting.steps,
            "learning-rate": LEARNING_RATE,
            "rank": RANK,
            "bits": case.bits,
            "checkpointing": int(case.checkpointing),
            "out": out,
        }
        script = Path(__file__).parent / "mlx_lm_lora_peer.py"
        launch(
            [sys.executable, str(script), *(t for k, v in arguments.items() for t in (f"--{k}", str(v)))], out
        )
        reports = json.loads((out / "reports.json").read_text())["reports"]
    return peer_run(reports, setting)


def ratios(pairs: list[tuple[Run, Run]]) -> tuple[list[float], list[float]]:
    """Targets per second and peak memory, ours over mlx-lm's, of every pair."""
    speed = [ours.tokens_per_second / peer.tokens_per_second for ours, peer in pairs]
    return speed, [ours.peak_bytes / peer.peak_bytes for ours, peer in pairs]


def report(case: Case, pairs: list[tuple[Run, Run]]) -> bool:
    """Whether a case reaches what is asked of it."""
    speed, memory = ratios(pairs)
    return statistics.median(speed) >= LEAST_RATIO and max(memory) < 1


def shown(pairs: dict[str, list[tuple[Run, Run]]], title: str) -> Table:
    """One line for each case."""
    table = Table(title=title)
    for heading in ("", "targets/s", "mlx-lm", "ratio", "of the pairs", "GiB", "mlx-lm", "of it"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, found in pairs.items():
        speed, memory = ratios(found)
        median = [f"{statistics.median(pair[i].tokens_per_second for pair in found):.1f}" for i in (0, 1)]
        peaks = [f"{statistics.median(pair[i].peak_bytes for pair in found) / 2**30:.2f}" for i in (0, 1)]
        every = ", ".join(f"{s:.2f}" for s in speed)
        table.add_row(
            name,
            *median,
            f"{statistics.median(speed):.2f}",
            every,
            *peaks,
            f"{statistics.median(memory):.2f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
