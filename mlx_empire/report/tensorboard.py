"""Decides what a run shows in TensorBoard: what `metrics.jsonl` has, under train/, eval/ and rank-N/."""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from mlx_empire.errors import UserError

FOLDER = "tensorboard"


class TensorBoardWriter:
    """Writes event files to `run_dir/tensorboard` (mode 0700) by way of the optional package tensorboardX.

    `after_step`: as in `MetricsWriter`.
    """

    def __init__(self, run_dir: Path, after_step: int | None = None) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"report.tensorboard: true: tensorboardX is missing: {sys.executable} -m pip install tensorboardX"
            ) from error
        folder = Path(run_dir) / FOLDER
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        purge = None if after_step is None else after_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def step(self, record: Mapping[str, Any]) -> None:
        """The figures of one step; lists, which are indexed by rank, go to one curve a rank."""
        self._write("train", record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """The figures of one evaluation: `eval_loss` becomes `eval/loss`, a score `eval/set.metric`."""
        figures = {**record, **record.get("scores", {})}
        self._write("eval", {name.removeprefix("eval_"): value for name, value in figures.items()})

    def _write(self, group: str, record: Mapping[str, Any]) -> None:
        step = int(record["step"])
        for name, value in record.items():
            if name == "step":
                continue
            if isinstance(value, list | tuple):
                for rank, item in enumerate(value):
                    self._scalar(f"rank-{rank}/{name}", item, step)
            else:
                self._scalar(f"{group}/{name}", value, step)
        self._writer.flush()

    def _scalar(self, tag: str, value: Any, step: int) -> None:
        if isinstance(value, int | float) and math.isfinite(value):
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
