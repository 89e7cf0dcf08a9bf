"""People with rows of their own, and the command that trains a daughter for each."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from support.mpi import rank_environment
from train.launching import MODEL, Outcome, Workspace, jsonl
from train.test_result import TRAIN, VALID

RECIPE = f"""\
model: {{path: {MODEL}, dtype: float32}}
tuning: {{type: lora, rank: 4}}
data: {{path: people, format: tokens, sequence_length: 64}}
batch: {{global_size: 2, micro_size: 1}}
optimizer: {{learning_rate: 5.0e-3}}
memory: {{gradient_checkpointing: true}}
run: {{dir: runs, steps: 6, eval_every: 3}}
"""


def with_people(folder: Path, names: Sequence[str]) -> Workspace:
    """A workspace with a recipe, and with other rows for each of `names`."""
    made = Workspace(folder)
    made.write("recipe.yaml", RECIPE)
    for number, name in enumerate(names):
        for split, rows in (("train", TRAIN), ("valid", VALID)):
            own = [rows[(i + number) % len(rows)][number:] for i in range(2 + number % 2)]
            made.write(f"people/{name}/{split}.jsonl", jsonl({"tokens": tokens} for tokens in own))
    return made


def hostfile(place: Workspace, limit: int, slots: int = 1) -> str:
    """The file of one machine that may use so many bytes for each slot."""
    place.write(
        "hosts.txt",
        f"{socket.gethostname()} slots={slots} # memory=64GiB limit={slots * limit / 1e6:.6f}MB\n",
    )
    return "hosts.txt"


def command(place: Workspace, *words: object) -> tuple[list[str], dict[str, str]]:
    line = [
        sys.executable,
        "-m",
        "mlx_empire.daughters",
        "recipe.yaml",
        "--people",
        "people",
        *map(str, words),
    ]
    return line, rank_environment(str(place.folder))


def run(place: Workspace, *words: object, fault: str = "") -> Outcome:
    line, environment = command(place, *words)
    return started(place, line, {**environment, "MLX_EMPIRE_FAULT": fault})


def worker(place: Workspace, *words: object, fault: str = "") -> Outcome:
    """The worker without the process that shows its table, which costs two seconds."""
    line, environment = command(place, *words, "--work")
    return started(place, line, {**environment, "MLX_EMPIRE_FAULT": fault})


def started(place: Workspace, line: list[str], environment: dict[str, str]) -> Outcome:
    ended = subprocess.run(
        line,
        cwd=place.folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return Outcome(ended.returncode, ended.stdout, ended.stderr)
