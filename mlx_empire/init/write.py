"""Lists packaged recipes with the ledger's answer to whether they fit, and writes one for a model and data.

What is written keeps the comments of the packaged one, holds rows out where the data has none for evaluations, is read
back before it is said to be written, and never takes the place of another file.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlx_empire.cluster.hostfile import Node, load_hostfile
from mlx_empire.cluster.machine import measure_this_machine
from mlx_empire.cluster.match import planned_nodes
from mlx_empire.comm.connect import choose_device
from mlx_empire.comm.failure import guard
from mlx_empire.data.files import locate
from mlx_empire.errors import UserError
from mlx_empire.formats.hf_folder import stored_if_whole
from mlx_empire.model.config import read_config
from mlx_empire.model.target import planned_target
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.assess import assess
from mlx_empire.recipe.load import load_recipe, parse_recipe, written
from mlx_empire.recipe.packaged import RECIPES, packaged
from mlx_empire.recipe.schema import Recipe
from mlx_empire.recipe.text import write_new_text

WIDE = 4000  # columns where nobody says how wide the output is: one line a row
ANSWERS = {"fits": "yes", "tight": "tight", "no": "no"}
HELD_OUT = "  validation_split: 0.1       # of the rows, for evaluations: the data has no valid.jsonl"
_LINE = re.compile(r"^(?P<key>  [a-z_]+: *)(?P<value>[^#\n]*?)(?P<comment> *#.*)?$")


def init_command(options: argparse.Namespace) -> int:
    """What the command line asks for; returns the exit code."""
    with guard(None):
        choose_device()
        nodes = machines_of(options.hosts)
        if options.recipe is None:
            show_recipes(nodes, options.model)
        else:
            write_recipe(options, nodes)
    return 0


def machines_of(hosts: Path | None) -> list[Node]:
    """The machines that are asked about: a hostfile's, or this one."""
    own = measure_this_machine()
    return [own] if hosts is None else planned_nodes(load_hostfile(hosts), own)


def show_recipes(nodes: Sequence[Node], model: Path | None) -> None:
    """Every packaged recipe with its first sentence and whether it fits, with its own model or with `model`."""
    if model is not None:
        read_config(model)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("recipe", "fits here", "what it is"):
        table.add_column(head, overflow="fold")
    for name, file in packaged(RECIPES).items():
        changes = [] if model is None else [f"model.path={written(model)}", "model.architecture=null"]
        answer = whether_it_fits(load_recipe(file, changes), nodes)
        table.add_row(name, Text(answer), first_sentence(file.read_text()))
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)
    whose = "each with the model that it names" if model is None else f"each with {model}"
    print(f"\n{whose}, on {', '.join(dict.fromkeys(node.name for node in nodes))}")
    print(f"  mlx-empire init RECIPE --model {shlex.quote(str(model or 'FOLDER'))} --data PATH")


def whether_it_fits(recipe: Recipe, nodes: Sequence[Node]) -> str:
    """The ledger's answer: yes, tight or no; or why it cannot tell."""
    if not isinstance(recipe.memory.shares, str) and len(recipe.memory.shares) != len(nodes):
        return f"? (its memory.shares are for {len(recipe.memory.shares)} ranks)"
    try:
        target = planned_target(recipe, stored_if_whole)
    except UserError:
        return f"? (it needs {recipe.model.path}, or --model)"
    return ANSWERS[assess(recipe, target.spec, nodes, state_bytes_of).verdict]


def first_sentence(text: str) -> str:
    """The first sentence of a recipe's comment."""
    head = " ".join(line.lstrip("# ") for line in text.splitlines()[:2] if line.startswith("# "))
    return re.split(r"\.(?:\s|$)", head)[0]


def write_recipe(options: argparse.Namespace, nodes: Sequence[Node]) -> None:
    """Write the recipe and say what comes next. UserError for what cannot be trained, and for a file that is there."""
    text = template(options.recipe)
    read_config(options.model)
    _, valid = locate(options.data)
    named = Path(os.path.abspath(options.data)).stem  # the data may be "." or "..", too
    out = options.out or Path(f"{named}.yaml")
    values = {
        "model.path": written(options.model),
        "data.path": written(options.data),
        "data.format": "auto",
        "run.dir": written(Path("runs") / out.stem),
    }
    title = f"# Made by `mlx-empire init {options.recipe}`. `mlx-empire keys` tells what every key decides."
    made = filled(text, values, title, {"data.format": HELD_OUT} if valid is None else {})
    recipe = parse_recipe(made, str(out))
    answer = whether_it_fits(recipe, nodes)
    write_new_text(out, made)
    hosts = "" if options.hosts is None else f" --hosts {shlex.quote(str(options.hosts))}"
    verb = "capacity" if answer == "no" else "inspect"
    why = {"yes": "it fits", "tight": "it fits, but only just"}.get(
        answer, "it does not fit; what to change:"
    )
    print(f"written: {out}; {why}")
    print(f"  mlx-empire {verb} {shlex.quote(str(out))}{hosts}")


def template(name: str) -> str:
    """The text of a packaged recipe. UserError for a name that none has."""
    known = packaged(RECIPES)
    if name not in known:
        near = difflib.get_close_matches(name[:60], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        raise UserError(f"init {name!r}: no recipe of that name comes with this; {hint}")
    return known[name].read_text(encoding="utf-8")


def filled(text: str, values: Mapping[str, str], title: str, below: Mapping[str, str]) -> str:
    """The recipe `text` with other values, without what is said of those that it had, and without model.architecture.

    `values`: by key, each of which has a line in the text. `title` takes the place of the comment at its head. `below`:
    by key the line that is put below it.
    """
    lines, section, left = [title], "", dict(values)
    body = text[re.search(r"^\w", text, re.M).start() :]  # type: ignore[union-attr]  # a recipe has sections
    for line in body.splitlines():
        if re.match(r"^\w+:", line):
            section = line.partition(":")[0]
        found = _LINE.match(line)
        key = f"{section}.{found['key'].strip(' :')}" if found else ""
        if key == "model.architecture":  # the folder says what it is
            continue
        lines.append(f"{found['key']}{left.pop(key)}" if found and key in left else line)
        lines += [below[key]] if key in below else []
    assert not left, f"a packaged recipe without {', '.join(left)}"
    return "\n".join(lines) + "\n"
