"""Tells what a recipe may say: `mlx-empire keys [PATTERN]`, from the schema, as docs/keys.md does.

PATTERN is a part of a key, of what it decides or of what it accepts, or another trainer's option.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from mlx_empire.comm.environment import asked
from mlx_empire.comm.failure import guard
from mlx_empire.errors import UserArguments, UserError
from mlx_empire.recipe.explain import nearest_key
from mlx_empire.recipe.foreign import KEYS, answer_to
from mlx_empire.recipe.reference import KeyRow, key_rows


def parser() -> UserArguments:
    """The words of this command."""
    made = UserArguments(
        prog="mlx-empire keys", description="Every key of a recipe, or those that a word is in."
    )
    made.add_argument("pattern", nargs="?", default="", help="such as optimizer, save_every or learning-rate")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    words = [word.lstrip("-") if answer_to(word) else word for word in words]
    pattern = asked(lambda: parser().parse_args(words)).pattern
    with guard(None):
        rows = list(matching(pattern))
        if not rows:
            raise UserError(
                f"{pattern!r}: is in no key of a recipe; {nearest_key(tuple(pattern.split('.')))}"
            )
        for row in rows:
            print(f"{row.key}: {row.default}\n    {row.decides}\n    {row.accepts}")
    return 0


def matching(pattern: str) -> Iterator[KeyRow]:
    """The keys with the pattern in their name, else those with it in their sentences; case, `-` and `_` are alike."""
    wanted = pattern.strip().lstrip("-").replace("-", "_").lower()
    rows = list(key_rows())
    meant = KEYS.get(wanted.replace("_", "-"))
    named = [row for row in rows if wanted in row.key or row.key == meant]
    yield from named or [
        row for row in rows if wanted in f"{row.decides} {row.accepts}".replace("-", "_").lower()
    ]


if __name__ == "__main__":
    sys.exit(main())
