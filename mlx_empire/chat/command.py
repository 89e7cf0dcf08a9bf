"""What may be typed after `mlx-empire chat`, which lets a finished result answer:

mlx-empire chat RUN [--against base|RUN] [--model FOLDER] [--temp T] [--top-p P] [--max-tokens N] [--seed S]

On a terminal it is a conversation, until the end of input (Ctrl-D). Otherwise every line of the input is a question of
its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_empire.comm.environment import asked
from mlx_empire.errors import UserArguments

BASE = "base"
MAX_TOKENS, MOST_TOKENS = 512, 1 << 20


def parser() -> UserArguments:
    """The words of this command."""
    made = UserArguments(prog="mlx-empire chat", description="Let a finished result answer.")
    made.add_argument(
        "run", type=Path, metavar="RUN", help="a finished run, its final/, or an adapter's folder"
    )
    made.add_argument("--against", metavar="base|RUN", help="answer beside it: its base, or another result")
    made.add_argument(
        "--model", type=Path, metavar="FOLDER", help="the base of an adapter, where no recipe tells"
    )
    made.add_argument(
        "--temp", type=float, default=0.0, metavar="T", help="temperature of sampling (0: none)"
    )
    made.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample from this much of probability (1)"
    )
    made.add_argument(
        "--max-tokens", type=int, default=MAX_TOKENS, metavar="N", help=f"of an answer ({MAX_TOKENS})"
    )
    made.add_argument("--seed", type=int, default=0, metavar="S", help="of sampling (0)")
    made.add_argument("--system", default="", metavar="TEXT", help="a system prompt")
    return made


def read(words: Sequence[str]) -> argparse.Namespace:
    """The options; UserError for a number that cannot be."""
    made = parser()
    options = made.parse_args(words)
    for name, value, low, high in (
        ("--temp", options.temp, 0, 100),
        ("--top-p", options.top_p, 0, 1),
        ("--max-tokens", options.max_tokens, 1, MOST_TOKENS),
        ("--seed", options.seed, 0, 2**32 - 1),
    ):
        if not low <= value <= high:
            made.error(f"{name}: {value}: expected a number from {low} to {high}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = asked(lambda: read(words))
    from mlx_empire.chat.talk import chat_command

    return chat_command(options)
