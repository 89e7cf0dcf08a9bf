"""Runs of a tiny model that are broken and go on: launches with faults in them, damaged copies of checkpoints, and the
comparison with a run that nothing happened to.

A `Lab` is a folder with a recipe, data and the runs made in it. Every rank has a checkpoint folder of its own, so that
ranks stand for machines that share no disk. A launch costs seconds: cases that kill nobody share one (`train_many`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from support.mpi import ROOT, mpirun, rank_environment

MODEL = ROOT / "tests" / "fixtures" / "tiny-llama-260k"
PROGRAM = Path(__file__).with_name("faulty_train.py")
STEPS, EVERY = 12, 3
TIMEOUT_SECONDS = 300.0
FAULT = "MLX_EMPIRE_FAULT"

# bfloat16 with 8-bit states keeps arrays of seven dtypes; its products are slow on a CPU, so rows are short. 40 rows,
# 6 a step: epochs end within steps. Six micro-batches in three cells: every rank of two or three accumulates.
RECIPE = f"""\
model: {{path: {MODEL}, dtype: bfloat16}}
data: {{path: rows.jsonl, format: tokens, sequence_length: 32, validation_split: 0.2}}
batch: {{global_size: 6, micro_size: 1, cells: 3}}
optimizer: {{learning_rate: 1.0e-3, state_bits: 8, weight_decay: 0.1}}
schedule: {{type: cosine, warmup: 1, final: 0.1}}
comm: {{bucket_bytes: 16384}}
run: {{dir: run, steps: {STEPS}, save_every: {EVERY}, eval_every: 4, eval_batches: 2}}
"""


@dataclass(frozen=True)
class Command:
    """A training command: overrides beside those that the lab gives, and the faults to inject."""

    arguments: Sequence[object] = ()
    fault: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def resumed(self) -> int | None:
        """The step that the run says it goes on after."""
        for line in self.stdout.splitlines():
            if line.startswith("going on after step "):
                return int(line.split(",")[0].split()[-1])
        return None


@dataclass(frozen=True)
class Event:
    """A row of the table of faults; `lost` are steps that were done and had to be done again, times are seconds."""

    fault: str
    injected: str
    lost: str
    detected: str
    continued: str


@dataclass(frozen=True)
class Result:
    """What must not depend on what happened on the way; samples by (step, micro-batch)."""

    weights: str
    curve: dict[int, tuple[float, float]]
    held_out: dict[int, float]
    samples: dict[tuple[int, int], tuple[int, ...]]

    def after(self, step: int) -> Result:
        """The part that a run has which began after `step`."""
        return Result(
            self.weights,
            {s: v for s, v in self.curve.items() if s > step},
            {s: v for s, v in self.held_out.items() if s > step},
            {key: rows for key, rows in self.samples.items() if key[0] > step},
        )


@dataclass
class Lab:
    """A folder with `recipe.yaml` and `rows.jsonl`; `events` is what became of which fault, for a table."""

    folder: Path
    events: list[Event] = field(default_factory=list)

    @classmethod
    def at(cls, folder: Path) -> Lab:
        rng = np.random.default_rng(0)
        rows = [{"tokens": rng.integers(0, 512, int(n)).tolist()} for n in rng.integers(10, 33, 50)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "recipe.yaml").write_text(RECIPE)
        return cls(folder)

    def checkpoints(self, name: str, rank: int) -> Path:
        """The folder in which a rank of run `name` keeps checkpoints."""
        return self.folder / name / f"node-{rank}"

    def train(self, name: str, *arguments: object, ranks: int = 2, fault: str = "") -> Outcome:
        """One run on so many ranks, in a launch of its own."""
        command = [*self._launcher(ranks), "one", *self._arguments(name, arguments)]
        ended = subprocess.run(
            command,
            cwd=self.folder,
            env=self._environment({FAULT: fault}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
        return Outcome(ended.returncode, ended.stdout, ended.stderr)

    def begin(self, name: str, *arguments: object, ranks: int = 2) -> subprocess.Popen[str]:
        """As `train`, not waited for: standard output is a pipe, standard error goes along."""
        return subprocess.Popen(
            [*self._launcher(ranks), "one", *self._arguments(name, arguments)],
            cwd=self.folder,
            env=self._environment({"PYTHONUNBUFFERED": "1"}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )

    def train_many(self, commands: Mapping[str, Command], ranks: int = 2) -> dict[str, Outcome]:
        """Runs by name, one after the other in one launch; rank 0's view of each."""
        listed = {
            name: {"arguments": self._arguments(name, command.arguments), "fault": command.fault}
            for name, command in commands.items()
        }
        asked, said = self.folder / "commands.json", self.folder / "outcomes.json"
        asked.write_text(json.dumps(listed))
        said.unlink(missing_ok=True)
        ended = subprocess.run(
            [*self._launcher(ranks), "many", str(asked), str(said)],
            cwd=self.folder,
            env=self._environment({}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
        outcomes: dict[str, Any] = json.loads(said.read_text()) if said.exists() else {}
        lost = listed.keys() - outcomes.keys()
        assert not lost, f"commands that ended the launch: {sorted(lost)}\n{ended.stderr[-6000:]}"
        return {name: Outcome(**outcome) for name, outcome in outcomes.items()}

    def copy(self, source: str, name: str, steps: Sequence[int], ranks: int = 2) -> str:
        """Begin run `name` with the checkpoints of `steps` of another run; its name."""
        for rank in range(ranks):
            target = self.checkpoints(name, rank)
            target.mkdir(parents=True)
            for step in steps:
                folder = f"step-{step:06d}"
                shutil.copytree(self.checkpoints(source, rank) / folder, target / folder)
        return name

    def begun(self, name: str, since: float) -> list[tuple[int, float]]:
        """(step, time) of the steps of run `name` that a rank has begun since then, in order of time."""
        path = self.folder / "times" / name
        lines = path.read_text().splitlines() if path.exists() else []
        found = [(int(step), float(at)) for step, at in map(str.split, lines)]
        return sorted((one for one in found if one[1] >= since), key=lambda one: one[1])

    def bring_together(self, name: str, ranks: int) -> None:
        """Copy what all nodes have into the first one's folder, as a person does who has one machine left."""
        for rank in range(1, ranks):
            for shard in self.checkpoints(name, rank).glob("step-*/shard-*"):
                shutil.copy(shard, self.checkpoints(name, 0) / shard.parent.name)

    def committed(self, name: str, ranks: int = 2) -> list[int]:
        """The steps of the checkpoints that some node committed."""
        found = {
            int(path.parent.name.removeprefix("step-"))
            for rank in range(ranks)
            for path in self.checkpoints(name, rank).glob("step-*/COMMIT")
        }
        return sorted(found)

    def result(self, name: str) -> Result:
        """What run `name` came to."""
        run = self.folder / name
        assert (run / "COMPLETE").exists(), f"{name} is not complete"
        digest = hashlib.sha256()
        for file in sorted((run / "final").glob("*.safetensors")):
            digest.update(file.read_bytes())
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [record["step"] for record in records if "eval_loss" not in record]
        assert steps == sorted(set(steps)), f"{name}: steps twice or out of order: {steps}"
        return Result(
            digest.hexdigest(),
            {r["step"]: (r["loss"], r["grad_norm"]) for r in records if "eval_loss" not in r},
            {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r},
            self._samples(name),
        )

    def _samples(self, name: str) -> dict[tuple[int, int], tuple[int, ...]]:
        """The rows that each micro-batch read; one that was computed again has read the same ones."""
        found: dict[tuple[int, int], tuple[int, ...]] = {}
        for file in (self.folder / "samples").glob(f"{name}.*"):
            for line in file.read_text().splitlines():
                step, micro, *rows = json.loads(line)
                assert found.setdefault((step, micro), tuple(rows)) == tuple(rows)
        return found

    def _launcher(self, ranks: int) -> list[str]:
        under = [mpirun(), "--oversubscribe", "-n", str(ranks)] if ranks > 1 else []
        return [*under, sys.executable, str(PROGRAM)]

    def _arguments(self, name: str, arguments: Sequence[object]) -> list[str]:
        places = [f"run.dir={name}", f"run.checkpoints={name}/node-{{rank}}"]
        return ["recipe.yaml", *places, *map(str, arguments)]

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        return rank_environment(str(self.folder), {"MLX_EMPIRE_CACHE": str(self.folder / "cache"), **more})


def succeeded(outcome: Outcome) -> Outcome:
    """The outcome of a command that was meant to complete."""
    assert outcome.code == 0, f"exit code {outcome.code}\n{outcome.stderr[-6000:]}\n{outcome.stdout[-3000:]}"
    return outcome


def flip(path: Path, at: int) -> None:
    """Turn one bit of the byte `at` (from the end if negative)."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(bytes(raw))


def first_tensor(path: Path) -> tuple[str, int]:
    """(name, first byte) of the first tensor in a safetensors file."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    name = next(
        name for name, entry in header.items() if name != "__metadata__" and not entry["data_offsets"][0]
    )
    return name, start
