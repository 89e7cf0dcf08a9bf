"""What may be typed after `mlx-empire open`:

    mlx-empire open [RUN]                 a page in the browser: one run, or the runs in a folder (runs/)
    mlx-empire open RUN --lan             for the phone, too: an address with a token
    mlx-empire open RUN --save FILE       the run's page as one file

It reads the run's folder and never owns the run: when it ends, nothing else does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_empire.comm.environment import asked
from mlx_empire.errors import UserArguments
from mlx_empire.run.names import RUNS

PORT = 8790


def parser() -> UserArguments:
    """The words of this command."""
    made = UserArguments(prog="mlx-empire open", description="Look at runs in a browser.")
    made.add_argument(
        "run",
        type=Path,
        nargs="?",
        default=RUNS,
        metavar="RUN",
        help=f"a run's folder, or one of runs ({RUNS}/)",
    )
    made.add_argument(
        "--lan",
        action="store_true",
        help="let others in this network look, who have the address with its token",
    )
    made.add_argument("--port", type=int, metavar="N", help=f"({PORT}, or a free one)")
    made.add_argument("--no-browser", action="store_true", help="only print the address")
    made.add_argument(
        "--save", type=Path, metavar="FILE", help="write the run's page as one file, and no more"
    )
    return made


def read(words: Sequence[str]) -> argparse.Namespace:
    """The options; UserError for what cannot be."""
    made = parser()
    options = made.parse_args(words)
    if options.save is not None and (options.lan or options.port is not None):
        made.error("--save writes a file: it takes neither --lan nor --port")
    if options.port is not None and not 0 < options.port < 65536:
        made.error(f"--port {options.port}: expected 1 to 65535")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = asked(lambda: read(words))
    from mlx_empire.comm.failure import guard

    with guard(None):
        if options.save is not None:
            from mlx_empire.page.saved import save_report

            print(save_report(options.run, options.save))
            return 0
        from mlx_empire.open.serve import serve_pages

        return serve_pages(options.run, options.lan, options.port, browser=not options.no_browser)
    raise AssertionError("guard always leaves")
