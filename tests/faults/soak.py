"""`make soak`: 20 kills at random over 60 steps, and the run must come to the same as one that nothing happened to.

Half of the kills strike in a phase drawn at random, the others come from outside at a random moment. The seed is
printed; `--seed` repeats a soak's draws (not its moments).
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.faults import PROGRAM, Lab, succeeded

RANKS = 2
PHASES = (
    *("load", "data", "forward", "backward", "reduce", "reduce-middle", "optimizer", "evaluate"),
    *("save-write", "save-fsync", "save-copy", "save-rename", "save-renamed", "save-commit", "retention"),
)


def main() -> int:
    """Soak; 1 if the results differ."""
    parser = argparse.ArgumentParser(description="Random kills, and the same result to the bit.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    draw = random.Random(options.seed)
    print(f"soak: seed {options.seed}, {options.kills} kills over {options.steps} steps", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        lab = Lab.at(Path(folder))
        settings = [f"run.steps={options.steps}", "run.keep_last=2"]
        succeeded(lab.train("whole", *settings, ranks=RANKS))
        kills, launches = 0, 0
        while kills < options.kills and launches < 3 * options.kills:
            launches += 1
            kills += one_kill(lab, draw, settings, kills, options)
            if (lab.folder / "broken" / "COMPLETE").exists():
                break
        else:
            succeeded(lab.train("broken", *settings, ranks=RANKS))
        same = lab.result("broken") == lab.result("whole")
    print(f"soak: {kills} kills in {launches} launches; the result is {'the same' if same else 'DIFFERENT'}")
    return int(not same or kills < options.kills)


def one_kill(
    lab: Lab, draw: random.Random, settings: list[str], kills: int, options: argparse.Namespace
) -> bool:
    """A launch in which a rank is to die before the run's share of steps is done; whether one did."""
    at = max(lab.committed("broken") or [0])
    left = max(1, (options.steps - at) // (options.kills - kills))
    rank, mark = draw.randrange(RANKS), lab.folder / f"struck-{kills}-{time.time_ns()}"
    step = min(at + draw.randint(1, 2 * left + 1), options.steps)
    if kills % 2 and Path("/proc").is_dir():  # elsewhere a rank's process is not told from others
        what = f"from outside in step {step}"
        killer = threading.Thread(
            target=kill_outside, args=(lab, rank, step, draw.random(), mark), daemon=True
        )
        killer.start()
        ended = lab.train("broken", *settings, ranks=RANKS)
    else:
        phase = draw.choice(PHASES)
        what = f"in {phase}" + ("" if phase.startswith(("load", "save", "retention")) else f" of step {step}")
        where = "" if phase.startswith(("load", "save", "retention", "evaluate")) else f"step={step};"
        fault = f"rank={rank};{where}phase={phase};action=kill;once={mark}"
        ended = lab.train("broken", *settings, ranks=RANKS, fault=fault)
    struck = mark.exists() and ended.code != 0
    told = f"rank {rank} killed {what}" if struck else f"rank {rank} was not killed {what}"
    print(f"  {kills + 1:>2}. began after step {at}, {told}; committed {lab.committed('broken')}", flush=True)
    return struck


def kill_outside(lab: Lab, rank: int, step: int, fraction: float, mark: Path) -> None:
    """Wait until `step` has begun, a moment longer, and kill the rank's process."""
    started = time.time()
    while not any(begun >= step for begun, _ in lab.begun("broken", started)):
        if time.time() > started + 120:
            return
        time.sleep(0.02)
    time.sleep(fraction * 0.5)
    pids = subprocess.run(
        ["pgrep", "-f", f"{PROGRAM} one recipe.yaml run.dir=broken"], capture_output=True, text=True
    )
    for pid in map(int, pids.stdout.split()):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        ours = f"MLX_EMPIRE_CACHE={lab.folder}".encode() in environment
        if ours and f"OMPI_COMM_WORLD_RANK={rank}\0".encode() in environment:
            mark.touch()
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
