"""Run by `faults.Lab`: `python -m mlx_empire.train`, once or many times in one process, noting which rows are read."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from mlx_empire.run import job
from mlx_empire.train import command as train

FAULT = "MLX_EMPIRE_FAULT"


def note_samples(name: str) -> None:
    """From here on write [step, micro-batch, rows...] of every micro-batch to samples/NAME.RANK, and when each step
    begins to times/NAME.
    """
    for folder in ("samples", "times"):
        Path(folder).mkdir(exist_ok=True)
    path = Path("samples") / f"{name}.{os.environ.get('OMPI_COMM_WORLD_RANK', '0')}"
    begun: set[int] = set()

    def noted(data: Any, seed: int, step: int, index: int, **sizes: int) -> Any:
        if step not in begun:
            begun.add(step)
            with (Path("times") / name).open("a") as file:
                file.write(f"{step + 1} {time.time()}\n")
        batch = original(data, seed, step, index, **sizes)
        with path.open("a") as file:
            file.write(json.dumps([step + 1, index, *map(int, batch.rows_read)]) + "\n")
        return batch

    job.micro_batch = noted


def named(arguments: list[str]) -> str:
    """The run's name: the last part of its folder's path, wherever it lies."""
    return next(
        Path(a.removeprefix("run.dir=")).name for a in reversed(arguments) if a.startswith("run.dir=")
    )


def captured(arguments: list[str]) -> dict[str, Any]:
    """Exit code and output of one command in this process."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code: Any = train.main(arguments)
    except SystemExit as ended:
        code = ended.code
    print(err.getvalue(), end="", file=sys.stderr, flush=True)
    return {"code": code, "stdout": out.getvalue(), "stderr": err.getvalue()}


original = job.micro_batch
if sys.argv[1] == "one":
    note_samples(named(sys.argv[2:]))
    sys.exit(train.main(sys.argv[2:]))
outcomes = {}
for name, command in json.loads(Path(sys.argv[2]).read_text()).items():
    os.environ[FAULT] = command["fault"]
    note_samples(name)
    outcomes[name] = captured(command["arguments"])
    if os.environ.get("OMPI_COMM_WORLD_RANK", "0") == "0":
        Path(sys.argv[3]).write_text(json.dumps(outcomes))
