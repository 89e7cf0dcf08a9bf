"""How the two trainers are run so that they do the same work: same rows, weights, batch, optimizer, ranks and BLAS.

Every step of a run sees the same rows (the data holds exactly one batch), so the losses of both trainers must agree
step by step: `same_work` checks it. The peer is launched with mlx.launch's MPI backend, its faster one on few cores:
with `ring` the launcher itself polls its children's pipes and burns a core for as long as they run.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SPEECHES = ROOT / "tests" / "fixtures" / "speeches" / "train.jsonl"
LOSS_TOLERANCE = 1e-3  # relative; sums in another order and a few AdamW steps stay far below
TIMEOUT_SECONDS = 3600


@dataclass(frozen=True)
class Setting:
    """What both trainers are asked to do. `rows` per rank and step, `width` input positions a row."""

    model: Path
    ranks: int = 2
    rows: int = 1
    width: int = 512
    warmup: int = 1
    measured: int = 3
    learning_rate: float = 1e-5

    @property
    def steps(self) -> int:
        """Steps of one run, warm-up included."""
        return self.warmup + self.measured

    @property
    def global_size(self) -> int:
        """Rows of one step, all ranks together."""
        return self.rows * self.ranks

    @property
    def tokens(self) -> int:
        """Targets of one step, all ranks together."""
        return self.global_size * self.width


@dataclass(frozen=True)
class Run:
    """One run: figures of its measured steps (medians), the losses of all steps, the worst rank's peak of memory."""

    name: str
    step_seconds: float
    tokens_per_second: float
    wait_seconds: float | None  # communication that was waited for; the peer does not tell
    peak_bytes: int
    losses: list[float]


def write_rows(setting: Setting, folder: Path) -> None:
    """`train.jsonl`: one batch of real text, each row exactly width + 1 tokens (the last is only a target)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(setting.model / "tokenizer.json"))
    length, ids = setting.width + 1, []
    for line in SPEECHES.read_text().splitlines():
        ids += tokenizer.encode(json.loads(line)["text"]).ids
        if len(ids) >= setting.global_size * length:
            break
    rows = [ids[i * length : (i + 1) * length] for i in range(setting.global_size)]
    assert len(rows[-1]) == length, "the text is too short for this batch"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps({"tokens": row}) + "\n" for row in rows))


def run_ours(setting: Setting, data: Path, stage: int) -> Run:
    """Full fine-tuning by mlx_empire under mpirun at one ZeRO stage; figures from its metrics.jsonl."""
    recipe = {
        "model": {"path": str(setting.model), "dtype": "float32"},
        "data": {"path": str(data), "format": "tokens", "sequence_length": setting.width},
        "batch": {"global_size": setting.global_size, "micro_size": setting.rows},
        # mlx-lm's trainer does not clip
        "optimizer": {"learning_rate": setting.learning_rate, "clip_norm": None},
        "memory": {"zero_stage": stage, "shares": "equal", "gradient_checkpointing": True},
        "report": {"progress": "never"},
    }
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        run_dir = Path(folder) / "run"
        file = Path(folder) / "recipe.yaml"
        text = {**recipe, "run": {"dir": str(run_dir), "steps": setting.steps}}
        file.write_text(json.dumps(text))  # JSON is YAML
        mpirun = [beside_python("mpirun"), "--oversubscribe", "-n", str(setting.ranks)]
        launch([*mpirun, sys.executable, "-u", "-m", "mlx_empire.train", str(file)], Path(folder))
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert all(record["tokens"] == setting.tokens for record in records), "another count of tokens"
    return our_run(f"stage {stage}", records, setting)


def our_run(name: str, records: list[dict[str, Any]], setting: Setting) -> Run:
    """The figures of a run of ours, from the lines of its metrics.jsonl."""
    counted = records[setting.warmup :]
    assert len(records) == setting.steps, f"{len(records)} steps, not {setting.steps}"
    return Run(
        name,
        statistics.median(r["step_seconds"] for r in counted),
        statistics.median(r["tokens_per_second"] for r in counted),
        statistics.median(r["comm_wait_seconds"] for r in counted),
        max(records[-1]["peak_bytes"]),
        [record["loss"] for record in records],
    )


def run_peer(setting: Setting, data: Path, backend: str) -> Run:
    """The same by mlx-lm's trainer under mlx.launch; figures as that trainer reports them."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        out = Path(folder)
        arguments = {
            "model": setting.model,
            "data": data / "train.jsonl",
            "global-size": setting.global_size,
            "width": setting.width,
            "steps": setting.steps,
            "learning-rate": setting.learning_rate,
            "out": out,
        }
        script = Path(__file__).parent / "mlx_lm_peer.py"
        launcher = [beside_python("mlx.launch"), "-n", str(setting.ranks), "--backend", backend]
        options = [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
        launch([*launcher, sys.executable, str(script), *options], out)
        summary = json.loads((out / "reports.json").read_text())
    assert summary["ranks"] == setting.ranks, (
        f"mlx-lm trained on {summary['ranks']} ranks, not {setting.ranks}"
    )
    reports = summary["reports"]
    assert reports[-1]["trained_tokens"] == setting.steps * setting.tokens, "another count of tokens"
    return peer_run(reports, setting)


def peer_run(reports: list[dict[str, Any]], setting: Setting) -> Run:
    """The figures of a run of mlx-lm's trainer, from its own reports."""
    counted = reports[setting.warmup :]
    assert len(reports) == setting.steps, f"{len(reports)} steps, not {setting.steps}"
    return Run(
        "mlx-lm",
        statistics.median(1 / r["iterations_per_second"] for r in counted),
        statistics.median(r["tokens_per_second"] for r in counted),
        None,
        int(reports[-1]["peak_memory"] * 1e9),
        [r["train_loss"] for r in reports],
    )


def same_work(ours: Run, peer: Run) -> bool:
    """Whether both trainers had the same loss before each step: then they trained the same weights alike."""
    pairs = zip(ours.losses, peer.losses, strict=True)
    return all(abs(a - b) <= LOSS_TOLERANCE * abs(b) for a, b in pairs)


def beside_python(program: str) -> str:
    """A program of the environment that runs us, else the one on PATH."""
    own = Path(sys.executable).parent / program
    found = str(own) if own.exists() else shutil.which(program)
    if found is None:
        sys.exit(f"benchmarks: {program} is not installed; run `make setup`, then `make bench`")
    return found


def environment() -> dict[str, str]:
    """This environment, fit for mpirun on few cores and as root; one BLAS thread per rank unless told otherwise."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_COMM", "PMIX_"))}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    defaults = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        "OPENBLAS_NUM_THREADS": "1",
    }
    # mlx-lm redraws its progress ten times a second on whatever says it is a terminal
    return {**defaults, **inherited, "PYTHONPATH": path, "PATH": beside, "TERM": "dumb"}


def launch(command: list[str], folder: Path) -> None:
    """Run to the end; SystemExit with the last lines of what it said when it failed."""
    log = folder / "log"
    with log.open("w") as output:
        # mlx.launch polls its standard input without rest when that is at its end, so it gets one that stays open
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait(TIMEOUT_SECONDS)
        except BaseException:
            process.terminate()
            raise
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        sys.exit(f"benchmarks: {' '.join(command[:8])} ... ended with {code}:\n{tail}")
