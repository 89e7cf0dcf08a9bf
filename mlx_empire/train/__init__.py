"""A run by a recipe: what may be typed, and the run's story with its loop."""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """The command, as `mlx_empire.train.main` had it when it was a file; returns the exit code."""
    from mlx_empire.train.command import main as command

    return command(arguments)
