"""What may be typed after `mlx-empire capacity`, which says what every machine will need, before a byte is allocated:

mlx-empire capacity RECIPE [--hosts FILE] [--json] [--html FILE] [--trace FILE] [key=value ...]
                           [--matrix [--compare FILE] | --ladder | --daughters | --synthetic] [--wire NAME]
                           [--calibrate | --unit FILE]
mlx-empire capacity --what [NAME] --hosts HOSTFILE [--tokens N] [--deadline 7d] [--budget DOLLARS] [--json]
mlx-empire capacity --federation FILE --hosts HOSTFILE [--json]

`--matrix` is of four standard clusters; with `--hosts` of those machines.

Exit code 0 where it fits (also tightly), 3 where it does not, 64 for bad input. Under mpirun every node reports its
own limits; otherwise the hostfile's are taken, and without a hostfile those of this machine. Two questions
need no recipe: `--what` these machines can train, and where the models of `--federation` live on them (exit code 3
where one that is to be in memory has no room).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_empire.comm.environment import asked
from mlx_empire.errors import UserArguments
from mlx_empire.plan.hardware import WIRES
from mlx_empire.recipe.arguments import RecipeArguments
from mlx_empire.recipe.packaged import host_file

DAUGHTERS = 8  # placed where nobody says how many
MOST_DAUGHTERS = 10_000
TOKENS, MOST_TOKENS = 10_000_000, 10**15  # of a run
WITHOUT_RECIPE = ("--federation", "--what")  # options that ask about machines alone


def parser() -> RecipeArguments:
    """The words of this command."""
    made = RecipeArguments(
        "capacity",
        "What every machine will need, before training.",
        hosts="the hostfile; without one, this machine",
        example="memory.zero_stage=2",
    )
    made.add_argument("--json", action="store_true", help="print JSON and nothing else")
    made.add_argument("--html", type=Path, metavar="FILE", help="also write a page to look at")
    for name, words in (
        ("matrix", "every model of the catalog on four clusters"),
        ("ladder", "what each technique saves, one after the other"),
        ("daughters", "tuning and serving small models of this one"),
        ("synthetic", "what three intentions of synthetic data take, beside the document's numbers"),
    ):
        made.add_argument(f"--{name}", action="append_const", dest="parts", const=name, help=words)
    made.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="also write a step as the clock predicts it (ui.perfetto.dev)",
    )
    made.add_argument("--compare", type=Path, metavar="CSV", help="with --matrix: where this file is wrong")
    made.add_argument("--count", type=int, default=DAUGHTERS, help="with --daughters: how many to place")
    made.add_argument("--wire", metavar="NAME", help=", ".join(wire.key for wire in WIRES))
    made.add_argument("--calibrate", action="store_true", help="measure this machine's speed first (seconds)")
    made.add_argument("--unit", type=Path, metavar="FILE", help="take the speed that a true layer had")
    made.epilog = (
        "Two questions need no recipe: --what [NAME] --hosts FILE says what machines can train, and --federation FILE "
        "--hosts FILE where models live on them; see mlx-empire capacity --what --help."
    )
    return made


def parser_without_recipe() -> UserArguments:
    """The words of this command where it is asked about machines alone."""
    made = UserArguments(prog="mlx-empire capacity", description="What machines can hold.")
    one = made.add_mutually_exclusive_group(required=True)
    one.add_argument(
        "--federation", type=Path, metavar="FILE", help="where the models of this YAML file live"
    )
    one.add_argument(
        "--what", nargs="?", const="", metavar="NAME", help="catalog models that can be trained, and how"
    )
    made.add_argument("--hosts", type=host_file, metavar="FILE", required=True, help="the hostfile")
    made.add_argument("--json", action="store_true", help="print JSON and nothing else")
    made.add_argument("--tokens", type=int, help=f"with --what: of a run ({TOKENS:,})")
    made.add_argument(
        "--deadline", metavar="TIME", help="with --what: which runs end in 36h, 7d or 2w at worst"
    )
    made.add_argument(
        "--budget", type=float, metavar="DOLLARS", help="with --what: which cost no more at worst"
    )
    made.add_argument(
        "settings",
        nargs="*",
        metavar="KEY=VALUE",
        help="with --what: of the recipe, such as optimizer.state_bits=8",
    )
    made.set_defaults(recipe=None)
    return made


def read(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; UserError for those that do not go together."""
    words = sys.argv[1:] if arguments is None else arguments
    if any(word.partition("=")[0] in WITHOUT_RECIPE for word in words):
        alone = parser_without_recipe()
        options = alone.parse_args(words)
        of_runs = (options.tokens, options.deadline, options.budget, options.settings or None)
        if options.what is None and any(value is not None for value in of_runs):
            alone.error("--tokens, --deadline, --budget and settings go with --what")
        options.tokens = TOKENS if options.tokens is None else options.tokens
        if not 1 <= options.tokens <= MOST_TOKENS or not (options.budget is None or options.budget > 0):
            alone.error(f"--tokens: 1 to {MOST_TOKENS:,}; --budget: more than 0 dollars")
        return options
    made = parser()
    options = made.parse_intermixed_args(arguments)
    options.parts = options.parts or ["report"]
    if len(options.parts) > 1:
        made.error(
            "one of --matrix, --ladder, --daughters and --synthetic at a time; --html FILE shows the first three"
        )
    if options.compare is not None and options.parts != ["matrix"]:
        made.error("--compare goes with --matrix")
    if options.trace is not None and options.parts != ["report"]:
        made.error("--trace goes with the report, not with --matrix, --ladder, --daughters or --synthetic")
    if not 1 <= options.count <= MOST_DAUGHTERS:
        made.error(f"--count {options.count}: place 1 to {MOST_DAUGHTERS:,}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = asked(lambda: read(arguments))
    if options.recipe is None:
        from mlx_empire.capacity.machines import machines_command

        return machines_command(options)
    from mlx_empire.capacity.answer import answer_command

    return answer_command(options)
