"""What a run tells: gathers each rank's figures and hands every record to the display, metrics.jsonl and TensorBoard.

All ranks call it, because memory and traffic are reported by rank; only rank 0 writes and prints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import mlx.core as mx

from mlx_empire import progress
from mlx_empire.cluster.hostfile import Node
from mlx_empire.comm.protocol import Communicator
from mlx_empire.evaluation.reading import ReadRow, write_readings
from mlx_empire.model.spec import ModelSpec
from mlx_empire.plan.fill import bought
from mlx_empire.plan.lengths import Every
from mlx_empire.plan.shares import RunPlan
from mlx_empire.plan.workload import step_shape
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.console import NodeRow, RunDisplay
from mlx_empire.report.metrics import MetricsWriter
from mlx_empire.sizes import amount

if TYPE_CHECKING:
    from mlx_empire.report.tensorboard import TensorBoardWriter


class RunReport:
    """Everything a run says; use as a context manager on every rank. `resumed`: the step from which it goes on;
    `log_every`: how often a step is told in a line of plain text."""

    def __init__(
        self,
        comm: Communicator,
        recipe: Recipe,
        spec: ModelSpec,
        plan: RunPlan,
        nodes: Sequence[Node],
        steps: int,
        resumed: int | None = None,
        log_every: Every | None = None,
    ) -> None:
        self._comm = comm
        self._predicted = [ledger.peak for ledger in plan.ledgers]
        self._last: Mapping[str, Any] = {}
        self._display: RunDisplay | None = None
        self._told_full = False
        self._writers: list[MetricsWriter | TensorBoardWriter] = []
        if comm.rank == 0:
            self._metrics = MetricsWriter(recipe.run.dir, resumed)
            self._tensorboard: TensorBoardWriter | None = None
            if recipe.report.tensorboard:  # off unless asked for, and a package that need not be there
                from mlx_empire.report.tensorboard import TensorBoardWriter

                self._tensorboard = TensorBoardWriter(recipe.run.dir, resumed)
            rows = [
                NodeRow(node.name, node.role or "-", share, ledger.peak, limit)
                for node, share, ledger, limit in zip(
                    nodes, plan.shards.shares, plan.ledgers, plan.limits, strict=True
                )
            ]
            title = title_rows(spec, plan, comm.size)
            self._display = RunDisplay(steps, rows, title, recipe.report.progress, log_every)

    def step(self, record: dict[str, Any], sent: int, received: int) -> None:
        """A step's record from every rank, with the bytes this rank moved in it. Collective.

        wait_seconds: comm_wait_seconds by rank; a straggler is the one that waits least. `time` becomes rank 0's on
        every rank: what is decided by the clock is decided by what metrics.jsonl says, and takes no message of its own.
        """
        peak = mx.get_peak_memory() + self._comm.staging_bytes
        by_rank = self._comm.gather_json(
            [peak, mx.get_cache_memory(), sent, received, record["comm_wait_seconds"], record["time"]]
        )
        *figures, times = zip(*by_rank, strict=True)
        names = ("peak_bytes", "cache_bytes", "bytes_sent", "bytes_received", "wait_seconds")
        record |= {name: list(values) for name, values in zip(names, figures, strict=True)}
        record["time"] = times[0]
        record["predicted_peak_bytes"] = self._predicted
        self._last = record
        if self._display is not None:
            self._write(record)
            self._display.step(record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """An evaluation: `step`, `eval_loss` (None without validation data) and perhaps `scores` by name."""
        if self._display is None:
            return
        self._write(record)
        self._display.evaluation(record)

    def samples(self, step: int, readings: Sequence[ReadRow]) -> None:
        """How held-out rows are read after `step`, from rank 0; what a disk refuses is said, and ends nothing."""
        if self._display is None:
            return
        try:
            write_readings(self._metrics.path.parent, step, readings)
        except OSError as error:
            self.message(f"WARNING: {self._metrics.path.parent}: {error.strerror}: samples are not written")

    def _write(self, record: Mapping[str, Any]) -> None:
        """To the files; a full disk is told once, and ends nothing."""
        self._metrics.write(record)
        if self._metrics.waiting and not self._told_full:
            self._told_full = True
            full = f"{self._metrics.path}: the disk is full; records wait in memory until it is not"
            self.message(f"WARNING: {full}")
            self.notify("disk", full)
        if self._tensorboard is not None and not self._metrics.waiting:  # its thread dies of a full disk
            write = self._tensorboard.evaluation if "eval_loss" in record else self._tensorboard.step
            write(record)

    def message(self, text: str) -> None:
        """A line for the user, from rank 0."""
        if self._display is not None:
            self._display.message(text)

    def messages(self, texts: Iterable[str]) -> None:
        """Several lines for the user, from rank 0."""
        for text in texts:
            self.message(text)

    def notify(self, kind: str, sentence: str) -> None:
        """A notice for whoever is elsewhere (`report.notify`), which the launcher sends; from rank 0."""
        if self._display is not None:
            progress.tell_notice(kind, sentence)

    def show_status(self, status: Callable[[], str | None]) -> None:
        """Have the live display show what `status` says, such as how far a save is."""
        if self._display is not None:
            self._display.status = status

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is None:
            return
        self._display.close(self._summary() if kind is None else None)
        self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _summary(self) -> dict[str, object]:
        """Predicted and measured peak side by side, and the last figures."""
        measured = self._last.get("peak_bytes", [])
        pairs = zip(self._predicted, measured, strict=False)
        peaks = ", ".join(f"rank {r}: {amount(m)} of {amount(p)}" for r, (p, m) in enumerate(pairs))
        return {"peak, measured of predicted": peaks}


def title_rows(spec: ModelSpec, plan: RunPlan, ranks: int) -> list[tuple[str, str]]:
    """The header: model, size, how it is divided."""
    layers = len(spec.units) - 1
    work = plan.work
    goes = any(step_shape(plan.shards, work, rank).offloaded for rank in range(ranks))
    return [
        ("model", f"{spec.name} ({spec.family}, {spec.dtype})"),
        ("parameters", f"{spec.parameters:,} ({spec.trainable_parameters:,} trained)"),
        ("ranks", f"{ranks}, {work.layout.micro_batches} micro-batches a step in {work.layout.cells} cells"),
        ("ZeRO stage", f"{plan.shards.zero_stage}, gradients kept in {work.gradient_dtype}"),
        ("recomputed", f"{layers - work.unrecomputed} of {layers} layers"),
        *((("waves", f"micro-batches pass {work.wave} at a time"),) if work.wave else ()),
        *((("inputs", "of recomputed layers go to a file of each rank"),) if goes else ()),
        *((("kept", kept),) if (kept := bought(spec, plan.shards, work, plan.ledgers)) else ()),
        *(
            (("updates", "in the backward, clipped by the last step's norm"),)
            if work.optimizer_in_backward
            else ()
        ),
    ]
