"""What may be typed after `mlx-empire import`, which makes a recipe of another trainer's configuration:

mlx-empire import FILE --data PATH [--model FOLDER] [--out FILE] [--json FILE]

FILE is YAML or JSON: PEFT's adapter_config.json, TRL's or transformers' arguments, or a file that nests them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlx_empire.comm.environment import asked
from mlx_empire.errors import UserArguments


def parser() -> UserArguments:
    """The words of this command."""
    made = UserArguments(
        prog="mlx-empire import",
        description="Make a recipe of another trainer's configuration (PEFT, TRL, transformers), line by line.",
    )
    made.add_argument("file", type=Path, metavar="FILE", help="the configuration, YAML or JSON")
    made.add_argument(
        "--data", type=Path, required=True, metavar="PATH", help="a folder with train.jsonl, or one file"
    )
    made.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="the model's folder, on whose weights the error of packing is measured (models/NAME)",
    )
    made.add_argument("--out", type=Path, metavar="FILE", help="the recipe to write (FILE with .recipe.yaml)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write what became of each line to this file")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = asked(lambda: parser().parse_args(arguments))
    from mlx_empire.importing.write import import_command

    return import_command(options)
