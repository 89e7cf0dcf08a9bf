"""Run alone or by mpirun: every command of `commands.json`, one after the other, each as if it were the only one.

A command is one of `mlx_empire.train`, or with `daughters` before it the worker of `mlx_empire.daughters`; with
`clocks` before it, each rank has its own made-up clock.

Each rank writes what came of each command to `outcomes-RANK.json`, after every one, so that a command that ends the
process is known by its absence.
"""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from train.clocks import made_up_clock

from mlx_empire.daughters import command as daughters
from mlx_empire.train import command as train


def outcome(arguments: list[str]) -> dict[str, Any]:
    """Exit code and output of one command in this process."""
    if arguments[:1] == ["clocks"]:
        with made_up_clock():
            return outcome(arguments[1:])
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code: Any = (
                daughters.main([*arguments[1:], "--work"])
                if arguments[:1] == ["daughters"]
                else train.main(arguments)
            )
    except SystemExit as ended:
        code = ended.code
    print(err.getvalue(), end="", file=sys.stderr, flush=True)
    return {"code": code, "stdout": out.getvalue(), "stderr": err.getvalue()}


if __name__ == "__main__":
    report = Path(f"outcomes-{os.environ.get('OMPI_COMM_WORLD_RANK', '0')}.json")
    outcomes: dict[str, Any] = {}
    for name, arguments in json.loads(Path("commands.json").read_text()).items():
        outcomes[name] = outcome(arguments)
        report.write_text(json.dumps(outcomes))
