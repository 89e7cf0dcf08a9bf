"""Starts the command as a user does: alone or under mpirun, in folders of the test's choosing, with a recipe of the
test's making; and reads what it left behind.

A launch costs seconds, so `launch_many` gives one launch many commands to run one after the other.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.mpi import mpirun, rank_environment

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
MODEL, SPEECHES, WORDNET = (FIXTURES / name for name in ("tiny-llama-260k", "speeches", "wordnet"))
TIMEOUT_SECONDS = 900  # of what hangs: a loaded machine takes minutes for many commands
SAID = "mlx_empire: "

# Six micro-batches in four cells: cells of unequal size, which neither two nor three ranks divide evenly.
RECIPE = f"""\
model: {{path: {MODEL}, dtype: float32}}
data: {{path: {SPEECHES}, format: text, sequence_length: 64}}
batch: {{global_size: 6, micro_size: 1, cells: 4}}
optimizer: {{learning_rate: 1.0e-3}}
schedule: {{type: cosine, warmup: 1, final: 0.1}}
run: {{dir: run, steps: 3, eval_batches: 2}}
"""


@dataclass(frozen=True)
class Outcome:
    """How a command ended; `said` are our own lines on stderr (mpirun adds some)."""

    code: int
    stdout: str
    stderr: str

    @property
    def said(self) -> list[str]:
        """Without the prefix."""
        return [line.removeprefix(SAID) for line in self.stderr.splitlines() if line.startswith(SAID)]


@dataclass(frozen=True)
class Workspace:
    """A folder with `recipe.yaml` in which commands run."""

    folder: Path

    def write(self, name: str, text: str) -> Path:
        """A small file, by its path relative to the workspace."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def train(
        self,
        *arguments: object,
        ranks: int = 0,
        hostfile: Path | None = None,
        folders: Sequence[Path] = (),
        umask: int = 0o022,
    ) -> Outcome:
        """`python -m mlx_empire.train ARGUMENTS`, alone (0 ranks) or under mpirun; `folders`: one rank in each."""
        program = [sys.executable, "-m", "mlx_empire.train", *map(str, arguments)]
        command = program
        if folders:
            contexts = [[":", "-n", "1", "-wdir", str(folder), *program] for folder in folders]
            command = [mpirun(), "--oversubscribe", *[word for context in contexts for word in context][1:]]
        elif ranks:
            hosts = ["-hostfile", str(hostfile)] if hostfile else ["--oversubscribe"]
            command = [mpirun(), *hosts, "-n", str(ranks), *program]
        return self._run(command, umask)

    def train_many(
        self, commands: Mapping[str, Sequence[object]], ranks: int = 0
    ) -> list[dict[str, Outcome]]:
        """All `commands` in one launch: each rank's outcomes by name. An alone rank 0 runs without mpirun."""
        listed = {name: list(map(str, arguments)) for name, arguments in commands.items()}
        self.write("commands.json", json.dumps(listed))
        reports = [self.folder / f"outcomes-{rank}.json" for rank in range(max(ranks, 1))]
        for report in reports:
            report.unlink(missing_ok=True)
        program = [sys.executable, str(Path(__file__).with_name("many_commands.py"))]
        launcher = [mpirun(), "--oversubscribe", "-n", str(ranks)] if ranks else []
        ended = self._run([*launcher, *program], 0o022)
        made = [json.loads(report.read_text()) if report.exists() else {} for report in reports]
        lost = [
            f"rank {r}: {sorted(listed.keys() - m.keys())}"
            for r, m in enumerate(made)
            if len(m) < len(listed)
        ]
        assert not lost, f"commands that ended the launch: {lost}\n{ended.stderr[-6000:]}"
        return [{name: Outcome(**outcome) for name, outcome in one.items()} for one in made]

    def _run(self, command: Sequence[str], umask: int) -> Outcome:
        environment = rank_environment(str(self.folder))
        ended = subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            check=False,
            umask=umask,
        )
        return Outcome(ended.returncode, ended.stdout, ended.stderr)


def succeeded(outcome: Outcome) -> Outcome:
    """The outcome of a command that was meant to complete."""
    assert outcome.code == 0, f"exit code {outcome.code}\n{outcome.stderr[-6000:]}\n{outcome.stdout[-2000:]}"
    assert outcome.said == []
    return outcome


def raw_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """(dtype, shape, bytes) of every tensor in a folder's safetensors files, read without any library."""
    found: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, about in json.loads(raw[8:start]).items():
            if name != "__metadata__":
                a, b = about["data_offsets"]
                assert name not in found
                found[name] = (about["dtype"], tuple(about["shape"]), raw[start + a : start + b])
    return found


def metrics(run: Path) -> list[dict[str, Any]]:
    """All records of a run, strictly JSON."""
    return [
        json.loads(line, parse_constant=_refuse) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]


def step_records(run: Path) -> list[dict[str, Any]]:
    """The records of training steps."""
    return [record for record in metrics(run) if "eval_loss" not in record]


def curve(run: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every step: what must not depend on how the run was spread out."""
    return [(record["step"], record["loss"], record["grad_norm"]) for record in step_records(run)]


def held_out(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of every evaluation."""
    return [(record["step"], record["eval_loss"]) for record in metrics(run) if "eval_loss" in record]


def jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")
