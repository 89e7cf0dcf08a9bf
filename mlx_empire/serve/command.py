"""What may be typed after `mlx-empire serve`, which serves many adapters of one base by the API of OpenAI:

mlx-empire serve PEOPLE [--model FOLDER] [--host NAME] [--port N] [--allowed-origins URL ...] [--max-tokens N]

PEOPLE is the folder of results that `mlx-empire daughters` made. A request names one of them: `"model": "alice"`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_empire.comm.environment import asked
from mlx_empire.errors import UserArguments

LOOPBACK, PORT, MAX_TOKENS = "127.0.0.1", 8080, 512


def parser() -> UserArguments:
    """The words of this command."""
    made = UserArguments(prog="mlx-empire serve", description="Serve many adapters of one base.")
    made.add_argument(
        "people", type=Path, metavar="PEOPLE", help="a folder with a finished daughter in each sub-folder"
    )
    made.add_argument(
        "--model", type=Path, metavar="FOLDER", help="the base, if not the one that their recipes name"
    )
    made.add_argument(
        "--host", default=LOOPBACK, metavar="NAME", help=f"where to listen ({LOOPBACK}: only this machine)"
    )
    made.add_argument("--port", type=int, default=PORT, metavar="N", help=f"({PORT}; 0: any that is free)")
    made.add_argument(
        "--allowed-origins",
        nargs="+",
        default=[],
        metavar="URL",
        help="web pages that may ask (none; * for all)",
    )
    made.add_argument(
        "--max-tokens", type=int, default=MAX_TOKENS, metavar="N",
        help=f"of an answer whose request does not say ({MAX_TOKENS})",
    )  # fmt: skip
    return made


def read(words: Sequence[str]) -> argparse.Namespace:
    """The options; UserError for a number that cannot be."""
    made = parser()
    options = made.parse_args(words)
    if not 0 <= options.port < 2**16:
        made.error(f"--port: {options.port}: expected a number from 0 to {2**16 - 1}")
    if options.max_tokens < 1:
        made.error(f"--max-tokens: {options.max_tokens}: expected at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = asked(lambda: read(words))
    from mlx_empire.serve.server import serve_command

    return serve_command(options)
