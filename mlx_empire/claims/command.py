"""What may be typed after `mlx-empire claims`, which puts the numbers of the owner's documents beside ours:

mlx-empire claims [WORD] [--json | --markdown]

WORD: only claims of this document (S0 to S4) or with this word in their line. `make claims` writes docs/claims.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_empire.comm.environment import asked
from mlx_empire.errors import UserArguments


def parser() -> UserArguments:
    """The words of this command."""
    made = UserArguments(
        prog="mlx-empire claims", description="The documents' numbers that decide something, beside ours."
    )
    made.add_argument("word", nargs="?", default="", help="such as S2, LoRA or Maverick")
    form = made.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON and nothing else")
    form.add_argument("--markdown", action="store_true", help="print the page docs/claims.md")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = asked(lambda: parser().parse_args(arguments))
    from mlx_empire.claims.page import claims_command

    return claims_command(options)
