"""Shows what a model will see of data: what `command` asks for, as text, JSON and a page.

Decides what stands for a recipe where there is none: its defaults, with the model and the data that were named. Under
mpirun rank 0 reads and tells; the others take part in the losses alone.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlx_empire.comm.connect import connect
from mlx_empire.comm.failure import guard, together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.data.files import files_there
from mlx_empire.errors import UserError, on_all_ranks
from mlx_empire.inspect.command import LOSS_ROWS, RECIPES
from mlx_empire.inspect.document import REFUSED, Document, inspection_document
from mlx_empire.inspect.findings import leaks, unmeasured
from mlx_empire.inspect.look import Inspection, counting, inspect_data, reading_of
from mlx_empire.inspect.page import inspection_page
from mlx_empire.inspect.terminal import print_inspection, print_next
from mlx_empire.recipe.changes import variant
from mlx_empire.recipe.load import load_recipe, parse_override, parse_recipe, written
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.html import refuse_unwritable_file, write_file
from mlx_empire.run.agree import share_recipe

ROWS, ROWS_OF_A_PAGE = 3, 30  # shown unless a person says how many
# What data alone is read by. Adapters need the least memory of what `--loss` could plan for.
ALONE = """\
model: {{path: {model}}}
tuning: {{type: lora}}
data: {{path: {data}, sequence_length: 2048}}
batch: {{global_size: 8, micro_size: 1}}
optimizer: {{learning_rate: 1.0e-4}}
run: {{dir: runs/inspect, steps: 1ep}}
"""


def inspect_command(options: argparse.Namespace) -> int:
    """What the command line asks for; returns the exit code."""
    with guard(None):
        comm = connect()
    with guard(comm):
        whole = options.recipe.suffix in RECIPES
        read = load_recipe if whole else partial(alone, model=options.model)
        recipe = share_recipe(comm, options.recipe, options.overrides, read)
        if options.loss and recipe.model.init == "random":
            raise on_all_ranks(
                UserError("model.init: random: a model that begins at random knows no row; leave --loss out")
            )
        if recipe.data.sources:
            with together(comm):
                code = inspect_sources(recipe, options) if comm.rank == 0 else None
            return int(comm.broadcast_json(code))
        found, rows = None, None
        with together(comm):
            if comm.rank == 0:
                if options.html is not None:
                    refuse_unwritable_file(
                        "--html", options.html, [options.recipe, *files_there(recipe.data.paths)]
                    )
                found = inspected(recipe, options, whole)
                rows = found.parts[0].own(found.parts[0].seen.measured)
        more, loss = _measured(comm, recipe, options, rows) if options.loss else ([], None)
        code = None
        with together(comm):
            if found is not None:
                if whole:
                    more = [*unmeasured(recipe, found.reading, found.parts), *more]
                document = inspection_document(found, more, loss, recipe.batch.global_size if whole else None)
                document["recipe"] = str(options.recipe) if whole else None
                document["model"] = str(recipe.model.path) if whole or options.model else None
                document["next"] = next_command(options, whole, document)
                show_inspection(document, options)
                code = document["exit_code"]
        return int(comm.broadcast_json(code))
    raise AssertionError("guard always leaves")


def alone(path: Path, overrides: Sequence[str], model: Path | None) -> Recipe:
    """The recipe that data is read by where none is named. UserError for changes to what is not its data's."""
    if not path.exists():
        raise UserError(f"{path}: neither a recipe nor data; name a YAML file, or a file or folder with rows")
    for change in overrides:
        key = parse_override(change)[0]
        if key[0] != "data" or key[1] == "path":
            raise UserError(
                f"{'.'.join(key)}: with data alone only its own keys change what is shown: data.sequence_length, "
                "data.format, data.mask_prompt, data.packing, data.validation_split; or name a recipe"
            )
    named = written(model) if model is not None else "none"
    return parse_recipe(ALONE.format(model=named, data=written(path)), "inspect", overrides)


def inspected(recipe: Recipe, options: argparse.Namespace, whole: bool) -> Inspection:
    """The data, read once."""
    reading, train, valid = reading_of(recipe, with_model=whole or options.model is not None)
    shown = options.rows or (ROWS if options.html is None else ROWS_OF_A_PAGE)
    measured = (options.loss_rows or LOSS_ROWS) if options.loss else 0
    return inspect_data(reading, train, valid, shown, measured)


def inspect_sources(recipe: Recipe, options: argparse.Namespace) -> int:
    """Show each of data.sources as if it stood alone, and what of its validation data others train on. UserError for
    what shows one place alone."""
    if options.loss or options.html is not None:
        one = f"data.sources=[] data.path={shlex.quote(str(recipe.data.paths[0]))}"
        raise UserError(f"--loss and --html show one place alone; say which of data.sources, such as {one}")
    each = [
        inspected(variant(recipe, {"data.path": path, "data.sources": ()}), options, whole=True)
        for path in recipe.data.paths
    ]
    documents = []
    for found in each:
        others = [one.parts[0] for one in each if one is not found]
        more = [leak for train in others for leak in leaks(train, *found.parts[1:])]
        if all(len(one.parts) == 1 for one in each):
            more += unmeasured(recipe, found.reading, found.parts)
        documents.append(inspection_document(found, more, None, None))
    codes = {document["exit_code"] for document in documents}
    code = REFUSED if REFUSED in codes else max(codes)
    about = {"recipe": str(options.recipe), "model": str(recipe.model.path), "exit_code": code}
    document = {"sources": documents, **about, "next": next_command(options, whole=True, document=about)}
    if options.json:
        print(json.dumps(document, indent=1))
        return code
    for source in documents:
        print_inspection(source, ROWS if options.rows is None else options.rows)
    print_next(document)
    return code


def _measured(
    comm: Communicator, recipe: Recipe, options: argparse.Namespace, rows: Sequence[Any] | None
) -> tuple[list[Any], Document | None]:
    """The findings by the model's losses, and their figures. Collective."""
    # Only here what trains is needed.
    from mlx_empire.inspect.loss import loss_document, loss_findings, losses

    if not comm.broadcast_json(None if rows is None else len(rows)):
        return [], None
    with counting() as tell:
        found = losses(comm, recipe, options.hosts, rows, tell("rows scored") if comm.rank == 0 else _nobody)
    return ([], None) if found is None else (loss_findings(found), loss_document(found))


def _nobody(count: int) -> None:
    """Nobody watches."""


def next_command(options: argparse.Namespace, whole: bool, document: Document) -> str | None:
    """What to type next; None where something is to be mended first."""
    if document["exit_code"]:
        return None
    path = shlex.quote(str(options.recipe))
    if whole and options.hosts is not None:
        return f"mlx-empire launch {path} --hosts {shlex.quote(str(options.hosts))}{_changes(options)}"
    if whole:
        return f"mlx-empire train {path}{_changes(options)}"
    if options.model is None:
        return f"mlx-empire inspect {path} --model FOLDER"
    return f"mlx-empire init daughter --model {shlex.quote(str(options.model))} --data {path}"


def _changes(options: argparse.Namespace) -> str:
    return "".join(f" {shlex.quote(change)}" for change in options.overrides)


def show_inspection(document: Document, options: argparse.Namespace) -> None:
    """Print the document as it is asked for, and write the page."""
    if options.html is not None:
        write_file("--html", options.html, inspection_page(document))
    if options.json:
        print(json.dumps(document, indent=1))
    else:
        print_inspection(document, ROWS if options.rows is None else options.rows)
        print_next(document)
