"""What may be typed after `mlx-empire list`, `compare` and `clean`:

    mlx-empire list [FOLDER] [--json]      the runs in a folder (runs/): state, step, losses, size
    mlx-empire compare RUN RUN ...         what differs in their recipes, and their figures side by side
    mlx-empire clean [FOLDER ...] [--yes]  what each deletion would free; deletes with --yes alone

`python -m mlx_empire.runs` is the same, with the verb as its first word.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_empire.comm.environment import asked
from mlx_empire.errors import UserArguments, UserError
from mlx_empire.run.names import RUNS


def parser(verb: str) -> UserArguments:
    """The words of `list`, `compare` or `clean`."""
    about = {
        "list": "The runs in a folder, and how they stand.",
        "compare": "What differs between runs: their recipes, and what came of them.",
        "clean": "What of finished runs can go, and what each deletion frees. Says it first; deletes with --yes.",
    }
    if verb not in about:
        raise UserError(f"{verb!r}: expected one of {', '.join(about)}")
    made = UserArguments(prog=f"mlx-empire {verb}", description=about[verb])
    if verb == "list":
        made.add_argument("folder", type=Path, nargs="?", default=RUNS, help=f"where runs lie ({RUNS}/)")
        made.add_argument("--json", action="store_true", help="print JSON and nothing else")
    elif verb == "compare":
        made.add_argument(
            "folders", type=Path, nargs="+", metavar="RUN", help="the folders of two runs or more"
        )
    else:
        made.add_argument(
            "folders", type=Path, nargs="*", default=[RUNS], metavar="FOLDER", help=f"({RUNS}/)"
        )
        made.add_argument("--yes", action="store_true", help="delete what is listed")
    return made


def read(words: Sequence[str]) -> argparse.Namespace:
    """The options, with the verb among them; UserError for what cannot be."""
    verb, *rest = words or [""]
    made = parser(verb)
    options = made.parse_args(rest)
    options.verb = verb
    if verb == "compare" and len(options.folders) < 2:
        made.error("compare needs two runs")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = asked(lambda: read(words))
    from mlx_empire.runs.show import show_command

    return show_command(options)
