"""What may be typed after `mlx-empire verify`, which proves what a recipe's techniques change:

mlx-empire verify RECIPE [--steps N] [--seeds N] [--own] [--json FILE] [--html FILE] [key=value ...]

Alone or under mpirun: what divides (ZeRO, shares) is proved over the ranks it is started with. Exit code 1 where bits
differ that must not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlx_empire.comm.environment import asked
from mlx_empire.recipe.arguments import RecipeArguments


def parser() -> RecipeArguments:
    """The words of this command."""
    made = RecipeArguments(
        "verify",
        "Prove what a recipe's techniques change.",
        hosts="the hostfile",
        example="optimizer.state_bits=8",
    )
    made.add_argument("--steps", type=int, default=40, help="steps of each run (40)")
    made.add_argument("--seeds", type=int, default=3, help="paired runs of each technique (3)")
    made.add_argument(
        "--own", action="store_true", help="train the recipe's own model, not a scaled-down one"
    )
    made.add_argument("--json", type=Path, help="write all figures to this file")
    made.add_argument("--html", type=Path, help="write a page with the loss curves")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = asked(lambda: parser().parse_intermixed_args(arguments))
    from mlx_empire.verify.runs import audit_command

    return audit_command(options)
