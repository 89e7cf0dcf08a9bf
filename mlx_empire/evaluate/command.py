"""What may be typed after `mlx-empire evaluate`, which scores a finished run, a model's folder or an adapter's:

mlx-empire evaluate RUN|MODEL [--sets FILE[=METRIC,...] ...] [--tasks NAME,... --tasks-from DIR] [--against base|RUN]
                    [--scorers] [--model FOLDER] [--hosts FILE] [--json FILE] [--html FILE] [key=value ...]

Without --sets and --tasks the sets of the run's recipe are asked; code that it names is run with --scorers only. Alone
or under mpirun: a model that no machine holds is streamed over the ranks, as in training.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mlx_empire.comm.environment import asked
from mlx_empire.errors import UserArguments
from mlx_empire.recipe.packaged import host_file

BASE = "base"


def parser() -> UserArguments:
    """The words of this command."""
    made = UserArguments(
        prog="mlx-empire evaluate",
        description="Score a finished run, a model's folder or an adapter's on sets of questions.",
    )
    made.add_argument("named", type=Path, metavar="RUN|MODEL", help="a finished run, or a folder of weights")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.sequence_length=4096")
    made.add_argument(
        "--sets",
        action="append",
        default=[],
        metavar="FILE[=METRIC,...]",
        help="a file of questions, and what is measured (what its first row has answers for)",
    )
    made.add_argument("--tasks", default="", metavar="NAME,...", help="benchmarks, such as arc_easy,piqa")
    made.add_argument("--tasks-from", type=Path, metavar="DIR", help="where NAME.jsonl of each task lies")
    made.add_argument("--scorers", action="store_true", help="run the code that the run's recipe names")
    made.add_argument("--against", metavar="base|RUN", help="score beside it: its base, or another result")
    made.add_argument(
        "--model", type=Path, metavar="FOLDER", help="the base of an adapter, where no recipe tells"
    )
    made.add_argument("--hosts", type=host_file, metavar="FILE", help="the hostfile")
    made.add_argument("--json", type=Path, metavar="FILE", help="write scores and rows to this file")
    made.add_argument("--html", type=Path, metavar="FILE", help="write a page with the rows that changed")
    return made


def read(words: Sequence[str] | None) -> argparse.Namespace:
    """The options; UserError for those that do not go together."""
    made = parser()
    options = made.parse_intermixed_args(words)
    options.tasks = [name for name in options.tasks.split(",") if name]
    if bool(options.tasks) != (options.tasks_from is not None):
        made.error("--tasks and --tasks-from go together: names of tasks, and the folder of their rows")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = asked(lambda: read(arguments))
    from mlx_empire.evaluate.score import evaluate_command

    return evaluate_command(options)
