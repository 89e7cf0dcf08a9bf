"""Results as what other tools open: merged models, adapters in PEFT's and mlx-lm's format, packed bases."""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """The command, as `mlx_empire.export.main` had it when it was a file; returns the exit code."""
    from mlx_empire.export.command import main as command

    return command(arguments)
