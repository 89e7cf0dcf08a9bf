"""What a person can type once a run is complete: three commands or four, the last lines that it prints."""

from __future__ import annotations

import shlex
from pathlib import Path

from mlx_empire.formats.base_layout import bitnet_family, is_of_our_family
from mlx_empire.model.packing_config import BITNET_NAME
from mlx_empire.recipe.schema import Recipe
from mlx_empire.run.names import CURRENT

PROMPT, WHOLE = "...", "as a whole model"


def next_commands(recipe: Recipe) -> list[str]:
    """Let the result speak, look at the run, and use the result elsewhere."""
    run = recipe.run.dir
    speak: str | None
    if recipe.tuning.type == "full":
        speak = _ask(recipe, run, run / "final")
        way = f"base {_word(run / 'final')} OUT --bits {recipe.tuning.qat or 8}"
        if recipe.tuning.qat_group == "matrix":
            way = f"bitnet {_word(run / 'final')} OUT"
        use = {f"mlx-empire export {way}": "packed, to use less memory"}
    else:
        family = bitnet_family(recipe.model.path)
        speak = _ask(recipe, run, recipe.model.path, run / "final") if family is None else None
        use = {} if family == BITNET_NAME else {f"mlx-empire export merge {_word(run)} OUT": WHOLE}
        use[_go_on(run)] = "go on, on the rows there are by then"
    told = {} if speak is None else {speak: "let it speak"}
    return _told({**told, f"mlx-empire open {_word(run)}": "look at it", **use})


def capacity_command(folder: Path, machines: int, hosts: Path | None) -> str:
    """The capacity report of the run in a folder, as a page; where its recipe names no hostfile, several machines need
    one."""
    where = " --hosts HOSTFILE" if machines > 1 and hosts is None else ""
    return f"mlx-empire capacity {_word(folder / 'recipe.yaml')}{where} --html capacity.html"


def next_of_many(recipe: Recipe, name: str) -> list[str]:
    """The same for a folder of daughters, with one of them, `name`."""
    run = recipe.run.dir
    used = run / name / CURRENT
    return _told(
        {
            _ask(
                recipe, run / name, recipe.model.path, used if used.is_symlink() else run / name / "final"
            ): f"let {name} speak",
            f"mlx-empire list {_word(run)}": "what came of each",
            f"mlx-empire export merge {_word(run / name)} OUT": WHOLE,
        }
    )


def _go_on(run: Path) -> str:
    """The same recipe from this adapter on, into a folder beside it."""
    beside = run.with_name(f"{run.name}-2")
    return f"mlx-empire train {_word(run / 'recipe.yaml')} tuning.start={_word(run)} run.dir={_word(beside)}"


def _ask(recipe: Recipe, run: Path, model: Path, adapter: Path | None = None) -> str:
    """The command that lets a model answer: mlx-lm's, where the family's module is mlx-lm's."""
    if is_of_our_family(recipe.model.path):
        return f"mlx-empire chat {_word(run)}"
    beside = "" if adapter is None else f" --adapter-path {_word(adapter)}"
    return f'mlx_lm.generate --model {_word(model)}{beside} --prompt "{PROMPT}"'


def _told(commands: dict[str, str]) -> list[str]:
    widest = max(map(len, commands))
    return ["next:", *(f"  {command:<{widest}}  # {why}" for command, why in commands.items())]


def _word(path: Path) -> str:
    return shlex.quote(str(path))
