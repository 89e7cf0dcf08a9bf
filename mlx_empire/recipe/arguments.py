"""Decides what may be typed after a verb that takes a recipe: RECIPE [--hosts FILE] [--option ...] [key=value ...].

Recipes and hostfiles that come with the package are found by name, where no file of that path is there (`packaged`).
Options of other trainers are answered with the key of a recipe that says the same (`foreign`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from mlx_empire.errors import UserArguments
from mlx_empire.recipe.foreign import answer_to
from mlx_empire.recipe.packaged import host_file, recipe_file


class RecipeArguments(UserArguments):
    """A parser with the positions of a recipe and of changes to it, as `recipe` and `overrides`, and `--hosts`.

    `hosts`: what that is for here, where it may be left out; `subject`: the name and the help of the first position,
    where it need not be a recipe.
    """

    def __init__(
        self,
        verb: str,
        about: str,
        *,
        hosts: str,
        example: str = "run.steps=5",
        subject: tuple[str | None, str] = (None, "a YAML file, or a name that mlx-empire init lists"),
    ) -> None:
        super().__init__(prog=f"mlx-empire {verb}", description=about)
        self.add_argument("recipe", metavar=subject[0], type=recipe_file, help=subject[1])
        self.add_argument("overrides", nargs="*", metavar="key=value", help=f"such as {example}")
        self.add_argument("--hosts", type=host_file, metavar="FILE", help=hosts)

    def parse_intermixed_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """The options. Raises UserError, also for another trainer's options."""
        words = list(sys.argv[1:] if args is None else args)
        for word in words:
            if word.partition("=")[0] not in self._option_string_actions and (answer := answer_to(word)):
                self.error(answer)
        options: argparse.Namespace = super().parse_intermixed_args(words, namespace)
        return options

    def error(self, message: str) -> NoReturn:
        """Called by argparse, which takes changes for required where the recipe is missing."""
        super().error(message.replace(", key=value", ""))
