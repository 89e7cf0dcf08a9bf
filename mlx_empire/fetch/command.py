"""Bring the model that a recipe names in `model.source` from the Hugging Face Hub to `model.path`.

    mlx-empire fetch RECIPE [--everywhere] [--hosts HOSTFILE] [--dry-run] [key=value ...]

A run needs the folder on its first machine only, which hands the others their parts; `--everywhere` copies it to all,
over ssh, from this one. The same command goes on where it was cut off: whole files are kept, and all are checked again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from mlx_empire.cluster.hostfile import load_hostfile
from mlx_empire.comm.failure import guard
from mlx_empire.errors import UserError
from mlx_empire.recipe.arguments import RecipeArguments
from mlx_empire.recipe.load import load_recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    with guard(None):
        options = _parser().parse_intermixed_args(arguments)
        recipe = load_recipe(options.recipe, options.overrides)
        if recipe.model.source is None:
            raise UserError(
                f"{options.recipe}: model.source: says nowhere to fetch {recipe.model.path} from; "
                "write source: owner/name@revision beside model.path"
            )
        cluster = None
        if options.everywhere:
            if (hosts := options.hosts or recipe.run.hosts) is None:
                raise UserError("--everywhere: no hostfile says which machines; add --hosts HOSTFILE")
            cluster = load_hostfile(hosts)
        # Only now: usage errors need neither the Hub's client nor MLX.
        from mlx_empire.fetch.everywhere import copy_to_all
        from mlx_empire.fetch.hub import Hub

        hub = Hub.of(recipe.model.source, recipe.model.path, os.environ)
        hub.announce(print)
        hub.require_room()
        if not options.dry_run:
            hub.download()
            hub.check(print)
        if cluster is not None:
            copy_to_all(cluster, recipe.model.path, hub.record, print, dry_run=options.dry_run)
        return 0
    raise AssertionError("guard does not return from an error")


def _parser() -> RecipeArguments:
    """The options of the command."""
    made = RecipeArguments(
        "fetch",
        "Bring the model that a recipe names in model.source to model.path, whole and checked.",
        hosts="the machines; without it run.hosts",
        example="model.source=owner/name@main",
    )
    made.add_argument(
        "--everywhere", action="store_true", help="to every machine of the hostfile, not only this one"
    )
    made.add_argument(
        "--dry-run", action="store_true", help="only say what would be fetched, and whether it fits"
    )
    return made


if __name__ == "__main__":
    sys.exit(main())
