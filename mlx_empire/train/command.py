"""What may be typed after `mlx-empire train`; `python -m mlx_empire.train` is the same, alone or under mpirun."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_empire.comm.environment import asked
from mlx_empire.recipe.arguments import RecipeArguments


def parser() -> RecipeArguments:
    """The words of this command."""
    made = RecipeArguments(
        "train",
        "Train a model by a recipe.",
        hosts="the hostfile, where mpirun's own cannot be found",
        example="memory.zero_stage=2 run.steps=5",
    )
    made.add_argument(
        "--dry-run", action="store_true", help="only say what it will need (see mlx-empire capacity)"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = asked(lambda: parser().parse_intermixed_args(arguments))
    from mlx_empire.train.story import train_command

    return train_command(options)
