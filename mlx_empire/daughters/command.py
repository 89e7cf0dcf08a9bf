"""What may be typed after `mlx-empire daughters`, which trains one adapter for each person:

mlx-empire daughters RECIPE --people DIR [--only NAME ...] [--hosts FILE] [--together N] [key=value ...]
mlx-empire daughters RECIPE --people DIR --watch [--once] [--every SECONDS]    new rows begin a new generation
mlx-empire daughters RECIPE --people DIR --rollback NAME[=N] | --pin NAME | --unpin NAME

Every sub-folder of DIR holds one person's data (train.jsonl, perhaps valid.jsonl) and becomes `run.dir`/NAME with a
`final/` of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_empire.comm.environment import asked
from mlx_empire.recipe.arguments import RecipeArguments

MOST_TOGETHER = 16
EVERY_SECONDS, MOST_SECONDS = 60.0, 86400


def parser() -> RecipeArguments:
    """The words of this command."""
    made = RecipeArguments(
        "daughters",
        "Train one adapter for each person.",
        hosts="the hostfile; without one, this machine alone",
    )
    made.add_argument(
        "--people", type=Path, required=True, help="the folder with a sub-folder for each person"
    )
    made.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="of all the people only this one; may be repeated",
    )
    made.add_argument(
        "--together", type=int, default=MOST_TOGETHER, metavar="N",
        help=f"train at most N at a time on a machine, fewer where memory says so ({MOST_TOGETHER})",
    )  # fmt: skip
    made.add_argument(
        "--watch",
        action="store_true",
        help="go on: whoever has new rows learns them from its last adapter, which stays in use if it was better",
    )
    made.add_argument(
        "--once", action="store_true", help="with --watch: look once, do what is to do, and end"
    )
    made.add_argument(
        "--every",
        type=float,
        default=EVERY_SECONDS,
        metavar="SECONDS",
        help=f"with --watch: how often files are looked at ({EVERY_SECONDS:g})",
    )
    for option, word, what in (
        ("--rollback", "NAME[=N]", "put generation N of a daughter into use, by default the one before"),
        ("--pin", "NAME", "keep what is in use: --watch trains nothing for this daughter"),
        ("--unpin", "NAME", "no longer"),
    ):
        made.add_argument(option, action="append", default=[], metavar=word, help=what)
    made.add_argument("--work", action="store_true", help="be a worker (used by the command itself)")
    return made


def read(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; UserError for a number that cannot be."""
    made = parser()
    options = made.parse_intermixed_args(arguments)
    if options.once and not options.watch:
        made.error("--once: has no meaning without --watch")
    if options.watch and (options.rollback or options.pin or options.unpin):
        made.error("--watch: goes on by itself; --rollback, --pin and --unpin are commands of their own")
    if not 0 < options.every <= MOST_SECONDS:
        made.error(f"--every: {options.every:g}: expected seconds above 0 and up to {MOST_SECONDS}")
    if options.together < 1:
        made.error(f"--together: {options.together}: a machine trains at least one at a time")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = asked(lambda: read(words))
    from mlx_empire.daughters.work import daughters_command

    return daughters_command(options, words)
