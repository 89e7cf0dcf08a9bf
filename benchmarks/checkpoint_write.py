"""How fast is a checkpoint written, and what does the step cost that writes? `python benchmarks/checkpoint_write.py`.

One process trains a randomly initialised llama. Each round measures, one right after the other on the same disk:

  plain    the shard's bytes, written one after the other into one file, then fsync: what the disk gives at most
  save     the same bytes as a checkpoint while nothing else runs: hashed, in safetensors, manifest, rename, commit
  step     a training step that saves nothing
  both     the step after `request`: forward and backward while the thread writes, updates that wait for it

What counts is the median over the rounds of save / plain (target: at least 0.75 of the plain bandwidth) and of
both / max(step, save) (target: at most 1.1). On a machine that does something else meanwhile, ratios scatter.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mlx_empire.checkpoint.manifest import Identity, Origin, Resolved
from mlx_empire.checkpoint.paths import remove_checkpoint, step_name
from mlx_empire.checkpoint.save import Policy, Saver
from mlx_empire.checkpoint.shard import live_pieces
from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.data.batches import MicroBatch
from mlx_empire.disk import create_private, sync_file
from mlx_empire.engine.trainer import Trainer, TrainerSettings
from mlx_empire.formats.source import RandomSource
from mlx_empire.model.target import make_target
from mlx_empire.optim.choose import make_optimizer
from mlx_empire.plan.shards import make_plan
from mlx_empire.plan.workload import Workload, cell_layout
from mlx_empire.recipe.sections import TuningSection
from mlx_empire.recipe.update_sections import OptimizerSection

ROOT = Path(__file__).resolve().parents[1]
PIECE = 32 << 20
LEAST_BANDWIDTH, MOST_STEP = 0.75, 1.1
RATE = 1e-5


def main() -> int:
    """Measure, print, write the results; 1 with --check when a target is missed."""
    options = parse()
    shutil.rmtree(options.folder, ignore_errors=True)
    with CommThread() as thread:
        trainer = make_trainer(options, thread)
        batch = rows(options)
        trainer.train_step([batch], int(batch.mask.sum()), 1, RATE)  # compiles
        nbytes = sum(piece.nbytes for piece in live_pieces(trainer.store, 0))
        with make_saver(trainer, options.folder) as saver:
            measured = [
                one_round(trainer, saver, batch, options.folder, 2 * k + 2) for k in range(options.rounds)
            ]
    shutil.rmtree(options.folder, ignore_errors=True)
    verdict = summary(measured, nbytes)
    show(measured, verdict)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"rounds": measured, **verdict}, indent=1) + "\n")
    return int(options.check and not verdict["reached"])


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Bandwidth of a checkpoint, and what the step that writes it costs."
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--hidden", type=int, default=768, help="width of the model (768: 85 million parameters)"
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument(
        "--tokens", type=int, default=256, help="tokens of a step; the more, the longer it computes"
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "checkpoint-bench", help="on that disk"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "checkpoint_write.json")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    return parser.parse_args()


def make_trainer(options: argparse.Namespace, thread: CommThread) -> Trainer:
    """A trainer of a random llama, in float32 with 32-bit states: 12 bytes a parameter are saved."""
    config = {
        "model_type": "llama",
        "hidden_size": options.hidden,
        "intermediate_size": 4 * options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // 64,
        "num_key_value_heads": options.hidden // 64,
        "vocab_size": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    built = make_target(config, TuningSection(), "benchmark", "float32")
    work = Workload(1, options.tokens, cell_layout(1, 1, 1, 1), 0, "float32", "auto", 1 << 22)
    plan = make_plan(built.spec.units, [1.0], 3)
    optimizer = make_optimizer(OptimizerSection(learning_rate=RATE))
    comm, settings = SoloCommunicator("here"), TrainerSettings(clip_norm=1.0)
    trainer = Trainer(built.model, built.spec, plan, work, comm, thread, optimizer, settings)
    source = RandomSource(built.rebuild, built.base, 0)
    for unit in plan.units:
        trainer.store.load(unit.index, source.unit(unit.index))
    trainer.prepare(packing=False)
    return trainer


def make_saver(trainer: Trainer, folder: Path) -> Saver:
    """A saver into `folder` that removes nothing: the plain write removes nothing either."""
    resolved = Resolved(cells=1, gradient_dtype="float32")
    identity = Identity(Origin("", "", None), 1, 0, resolved, trainer.store.plan)
    saver = Saver(SoloCommunicator("here"), trainer.store, folder, identity, Policy(None, False))
    saver.open()
    return saver


def rows(options: argparse.Namespace) -> MicroBatch:
    """One row of random tokens."""
    tokens = np.random.default_rng(0).integers(0, 8192, (1, options.tokens + 1)).astype(np.int32)
    return MicroBatch(tokens[:, :-1], tokens[:, 1:], np.ones((1, options.tokens), np.float32), None, (0,))


def one_round(trainer: Trainer, saver: Saver, batch: MicroBatch, folder: Path, step: int) -> dict[str, float]:
    """Seconds of each of the four."""

    def train() -> None:
        trainer.train_step([batch], int(batch.mask.sum()), step, RATE)

    def save(number: int) -> None:
        saver.request(number, {})
        saver.finish()

    def both() -> None:
        saver.request(step + 1, {})
        train()

    plain_file = folder / "plain"
    seconds = {
        "plain": timed(lambda: write_plain(trainer, plain_file)),
        "save": timed(lambda: save(step)),
        "step": timed(train),
        "both": timed(both),
    }
    plain_file.unlink()
    saver.finish()
    assert saver.newest == step + 1
    for old in (step, step + 1):
        remove_checkpoint(folder / step_name(old))
    return seconds


def write_plain(trainer: Trainer, path: Path) -> None:
    """The bytes of the shard into one file, fsynced."""
    with create_private(path) as file:
        for piece in live_pieces(trainer.store, 0):
            for view in piece.views:
                for start in range(0, view.nbytes, PIECE):
                    file.write(view[start : start + PIECE].data)
        sync_file(file)


def timed(action: Callable[[], object]) -> float:
    """Seconds that it takes, from a disk with nothing left to write."""
    os.sync()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def summary(measured: list[dict[str, float]], nbytes: int) -> dict[str, Any]:
    """Medians over the rounds, and whether they reach the targets."""
    bandwidth = statistics.median(one["plain"] / one["save"] for one in measured)
    step = statistics.median(one["both"] / max(one["step"], one["save"]) for one in measured)
    return {
        "bytes": nbytes,
        "bandwidth_of_plain": bandwidth,
        "step_of_the_longer": step,
        "reached": bandwidth >= LEAST_BANDWIDTH and step <= MOST_STEP,
    }


def show(measured: list[dict[str, float]], verdict: dict[str, Any]) -> None:
    """A table on the terminal."""
    table = Table(title=f"a checkpoint of {verdict['bytes'] / 1e9:.2f} GB, seconds")
    for name in ("plain", "save", "step", "both", "plain / save", "both / longer"):
        table.add_column(name, justify="right")
    for one in measured:
        ratios = (one["plain"] / one["save"], one["both"] / max(one["step"], one["save"]))
        seconds = [one[name] for name in ("plain", "save", "step", "both")]
        table.add_row(*(f"{value:.2f}" for value in (*seconds, *ratios)))
    console = Console(width=100)
    console.print(table)
    console.print(
        f"bandwidth {verdict['bandwidth_of_plain']:.2f} of a plain write (target {LEAST_BANDWIDTH} or more), "
        f"the step {verdict['step_of_the_longer']:.2f} of the longer of both (target {MOST_STEP} or less)"
    )


if __name__ == "__main__":
    sys.exit(main())
