"""What may be typed after `mlx-empire init`:

mlx-empire init [--model FOLDER] [--hosts FILE]                       the recipes that come with this; which fit
mlx-empire init RECIPE --model FOLDER --data PATH [--out FILE]        one of them, for that model and data
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mlx_empire.comm.environment import asked
from mlx_empire.errors import UserArguments
from mlx_empire.recipe.packaged import host_file


def parser() -> UserArguments:
    """The words of this command."""
    made = UserArguments(
        prog="mlx-empire init",
        description="List the recipes that come with this, or write one of them for your model and data.",
    )
    made.add_argument("recipe", nargs="?", help="a name from the list; without one, the list")
    made.add_argument("--model", type=Path, metavar="FOLDER", help="the Hugging Face folder to begin with")
    made.add_argument("--data", type=Path, metavar="PATH", help="a folder with train.jsonl, or one file")
    made.add_argument("--out", type=Path, metavar="FILE", help="the recipe to write (NAME-of-the-data.yaml)")
    made.add_argument(
        "--hosts", type=host_file, metavar="FILE", help="the hostfile; without one, this machine"
    )
    return made


def read(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; UserError where a recipe is named without the model and data that it is for."""
    made = parser()
    options = made.parse_intermixed_args(arguments)
    if options.recipe is None and (options.data is not None or options.out is not None):
        made.error(
            "say which recipe: mlx-empire init RECIPE --model FOLDER --data PATH; without more, it lists them"
        )
    if options.recipe is not None and (options.model is None or options.data is None):
        made.error(f"init {options.recipe}: say --model FOLDER and --data PATH")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = asked(lambda: read(arguments))
    from mlx_empire.init.write import init_command

    return init_command(options)
