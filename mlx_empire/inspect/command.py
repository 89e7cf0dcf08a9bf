"""What may be typed after `mlx-empire inspect`, which shows what a model will see of data, before training:

mlx-empire inspect RECIPE [--rows N] [--loss] [--json | --html FILE] [key=value ...]
mlx-empire inspect DATA [--model FOLDER] ...          without a model only what needs no tokens is told
mlx-empire inspect DATA --convert OUT [--columns PROMPT,ANSWER] [--subset NAME] [--json]

DATA of a conversion may also be a data set of the Hugging Face Hub: owner/name or owner/name@revision.

Exit code 0 where nothing is in the way of training, 64 where a run would refuse rows, 65 where rows of the validation
data are also in the training data; with `--loss` 3 where the model does not fit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mlx_empire.comm.environment import asked
from mlx_empire.recipe.arguments import RecipeArguments

MOST_ROWS = 100_000
LOSS_ROWS = 1000
RECIPES = (".yaml", ".yml")


def parser() -> RecipeArguments:
    """The words of this command."""
    made = RecipeArguments(
        "inspect",
        "Show what the model will see of a recipe's data, or of data alone; or convert other tools' rows.",
        subject=("RECIPE|DATA", "a recipe, or data: a file, a folder, with --convert a data set of the Hub"),
        hosts="with --loss: the hostfile, where mpirun's own cannot be found",
        example="data.sequence_length=1024",
    )
    made.add_argument("--model", type=Path, metavar="FOLDER", help="with DATA: whose tokens are shown")
    made.add_argument(
        "--rows", type=int, metavar="N", help="how many rows are shown, a fair sample (3; 30 on a page)"
    )
    made.add_argument(
        "--loss", action="store_true", help="also what the model makes of the rows before training"
    )
    made.add_argument(
        "--loss-rows",
        type=int,
        metavar="N",
        help=f"with --loss: of how many rows, a fair sample ({LOSS_ROWS})",
    )
    made.add_argument("--json", action="store_true", help="print JSON and nothing else")
    made.add_argument("--html", type=Path, metavar="FILE", help="also write a page to look at")
    made.add_argument(
        "--convert", type=Path, metavar="OUT", help="write DATA as our rows: a folder, or a .jsonl file"
    )
    made.add_argument(
        "--columns", metavar="PROMPT,ANSWER", help="with --convert: which columns are learnt from"
    )
    made.add_argument(
        "--subset", metavar="NAME", help="with --convert: which subset of a data set of the Hub"
    )
    return made


def read(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; UserError for those that do not go together."""
    made = parser()
    options = made.parse_intermixed_args(arguments)
    recipe = options.recipe.suffix in RECIPES
    if recipe and options.model is not None:
        made.error("--model goes with DATA; a recipe names its model: model.path=FOLDER changes it")
    if recipe and options.convert is not None:
        made.error("--convert goes with DATA, not with a recipe")
    if options.convert is None and (options.columns is not None or options.subset is not None):
        made.error("--columns and --subset go with --convert")
    others = (options.model, options.rows, options.html, options.hosts, options.loss or None)
    if options.convert is not None and (options.overrides or any(one is not None for one in others)):
        made.error(
            "--convert only writes rows: leave --model, --rows, --loss, --html, --hosts and key=value out, and "
            "inspect OUT next"
        )
    if options.loss and not recipe and options.model is None:
        made.error("--loss: say --model FOLDER: whose loss")
    if options.loss_rows is not None and not options.loss:
        made.error("--loss-rows goes with --loss")
    for name, count in (("--rows", options.rows), ("--loss-rows", options.loss_rows)):
        if count is not None and not 0 < count <= MOST_ROWS:
            made.error(f"{name} {count}: 1 to {MOST_ROWS:,}")
    if options.columns is not None:
        names = [name.strip() for name in options.columns.split(",")]
        if len(names) != 2 or not all(names):
            made.error(
                f"--columns {options.columns!r:.60}: two names with a comma between, such as question,answer"
            )
        options.columns = names
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = asked(lambda: read(arguments))
    if options.convert is not None:
        from mlx_empire.inspect.convert import convert_command

        return int(convert_command(options))
    from mlx_empire.inspect.answer import inspect_command

    return int(inspect_command(options))
