"""What may be typed after `mlx-empire export merge | peft | mlx-lm | base | bitnet | push FROM OUT`.

    merge   an adapter added into its base: a whole model folder of plain weights, or packed as --pack says
    peft    an adapter in PEFT's format, for torch
    mlx-lm  an adapter in mlx-lm's format
    base    a model folder packed as --bits says, ternary included: a whole model folder for mlx-lm
    bitnet  a model trained as ternary with one scale a matrix, in BitNet's packed layout
    push    a finished run as a private repository OWNER/NAME of the Hugging Face Hub

FROM is a run's folder, or a folder with an adapter in either format (then --model names its base); for `base` and
`bitnet` it is a model's folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from mlx_empire.comm.environment import asked
from mlx_empire.errors import UserArguments
from mlx_empire.recipe.fields import Bits

PUSH = "push"
BITNET = "bitnet"
WAYS = ("merge", "peft", "mlx-lm", "base", BITNET, PUSH)
STORED = "stored"


def parser() -> UserArguments:
    """The words of this command."""
    made = UserArguments(
        prog="mlx-empire export",
        description="Turn a result into what other tools open.",
        epilog="merge: an adapter added into its base. peft, mlx-lm: an adapter in that format. base: a model packed. "
        "bitnet: a model trained as ternary in BitNet's layout. "
        "push: a finished run to the Hugging Face Hub.",
    )
    packings = ", ".join(map(str, get_args(get_args(Bits)[0])))
    made.add_argument("way", choices=WAYS, help="what to write")
    made.add_argument("source", type=Path, metavar="FROM", help="a run's folder, an adapter's or a model's")
    made.add_argument("out", type=Path, metavar="OUT", help="the folder to be written; push: OWNER/NAME")
    made.add_argument("--model", type=Path, help="the base, where FROM does not name it")
    made.add_argument("--bits", help=f"how the base is packed: {packings}")
    made.add_argument(
        "--pack", help=f"merge: pack the result again, as one of these or as the base: {STORED}"
    )
    made.add_argument("--base", metavar="OWNER/NAME", help="push: what the base is called on the Hub")
    made.add_argument("--public", action="store_true", help="push: for everybody to see")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = asked(lambda: parser().parse_intermixed_args(arguments))
    from mlx_empire.export.ways import export_command

    return export_command(options)
