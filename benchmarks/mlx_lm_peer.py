"""The peer: mlx-lm's own trainer, doing the same work as ours. Started on every rank by `mlx.launch`.

mlx-lm's "full" fine-tuning leaves embeddings, final norm and head frozen; here everything is trained. Its data
loader, loss, gradient checkpointing, averaging over the ranks and AdamW are used as they are. Rank 0 writes what the
trainer says about each step, so the figures are the peer's own.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.utils import load_model


class Recorder(TrainingCallback):
    """Keeps the trainer's reports: iteration, train_loss, iterations_per_second, tokens_per_second, peak_memory; and
    the CPU seconds of this process since the one before."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []
        self._at = time.process_time()

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        before, self._at = self._at, time.process_time()
        self.reports.append({**train_info, "cpu_seconds": self._at - before})


def loss_of_rows(model: nn.Module, batch: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
    """mlx-lm's default loss, but a row's last target is its last token and not the padding after it."""
    inputs, targets = batch[:, :-1], batch[:, 1:]
    steps = mx.arange(1, targets.shape[1] + 1)
    mask = mx.logical_and(steps >= lengths[:, :1], steps < lengths[:, 1:])
    losses = nn.losses.cross_entropy(model(inputs), targets) * mask
    count = mask.sum()
    return losses.astype(mx.float32).sum() / count, count


def read_rows(file: Path) -> list[tuple[list[int], int]]:
    """(tokens, length of the prompt) as mlx-lm's loader wants them; nothing is prompt."""
    return [(json.loads(line)["tokens"], 0) for line in file.read_text().splitlines()]


def train_recorded(
    model: nn.Module, options: argparse.Namespace, rows: int, *, checkpointing: bool
) -> list[dict[str, Any]]:
    """mlx-lm's trainer with AdamW as ours, `rows` a step and one report for each step; the reports."""
    recorder = Recorder()
    train(
        model,
        optim.AdamW(
            options.learning_rate, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.0, bias_correction=True
        ),
        read_rows(options.data),
        args=TrainingArgs(
            batch_size=rows,
            iters=options.steps,
            steps_per_report=1,
            steps_per_save=options.steps + 1,
            max_seq_length=options.width + 1,  # a row is one token longer: its last target
            adapter_file=str(options.out / "adapters.safetensors"),
            grad_checkpoint=checkpointing,
        ),
        loss=loss_of_rows,
        training_callback=recorder,
    )
    return recorder.reports


def main() -> None:
    """Train for `--steps` steps with one report for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help='a file of {"tokens": [...]} lines')
    parser.add_argument("--global-size", type=int, required=True, help="rows per step, all ranks together")
    parser.add_argument("--width", type=int, required=True, help="input positions of a row")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for reports.json and mlx-lm's own files"
    )
    options = parser.parse_args()

    model, _ = load_model(options.model)
    model.set_dtype(mx.float32)
    model.unfreeze()
    parameters = tree_flatten(model.parameters())
    assert len(tree_flatten(model.trainable_parameters())) == len(parameters), "every parameter is trained"
    mx.eval(model.parameters())

    reports = train_recorded(model, options, options.global_size, checkpointing=True)
    world = mx.distributed.init()
    if world.rank() == 0:
        summary = {
            "ranks": world.size(),
            "parameters": sum(array.size for _, array in parameters),
            "reports": reports,
        }
        (options.out / "reports.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    main()
