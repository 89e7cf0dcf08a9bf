"""What may be typed after `mlx-empire sweep`, which trains adapters by several settings and goes on with the best:

mlx-empire sweep RECIPE learning_rate=1e-4,2e-4 rank=8,16,32 [--keep N] [--by METRIC] [section.key=value ...]

A key with several values is swept, by its name alone or with its section; one with a single value changes the recipe.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mlx_empire.comm.environment import asked
from mlx_empire.recipe.arguments import RecipeArguments

KEEP, MOST_KEEP = 3, 100


def parser() -> RecipeArguments:
    """The words of this command."""
    made = RecipeArguments(
        "sweep",
        "Train adapters by several settings, and go on with the best.",
        hosts="the hostfile, for what this machine may use",
        example="learning_rate=1e-4,2e-4 rank=8,16",
    )
    made.add_argument(
        "--keep", type=int, default=KEEP, metavar="N", help=f"one of N goes on at each comparison ({KEEP})"
    )
    made.add_argument(
        "--by", metavar="METRIC", help="what is compared (the gate's metric, else the first score)"
    )
    return made


def read(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; UserError for a number that cannot be."""
    made = parser()
    options = made.parse_intermixed_args(arguments)
    if not 2 <= options.keep <= MOST_KEEP:
        made.error(f"--keep: {options.keep}: expected a whole number from 2 to {MOST_KEEP}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = asked(lambda: read(arguments))
    from mlx_empire.daughters.sweep import sweep_command

    return sweep_command(options)
