"""Reads a configuration, says line by line what became of it, and writes the recipe that it makes.

Every line of the file that says something has a verdict: a key's own (`rules`), an item's that of its list, a heading's
"heading". What a recipe must have and the file leaves out is what transformers or TRL take then, and is told too. Where
two lines want different values of one key, an adapter's kind is the one that packs, and otherwise the first holds. What
the command line says goes before the file.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlx_empire.comm.connect import choose_device
from mlx_empire.comm.failure import guard
from mlx_empire.errors import UserError
from mlx_empire.importing.meaning import MAPPED, NOT_POSSIBLE, REPLACED, Meaning
from mlx_empire.importing.packing_error import packing_error
from mlx_empire.importing.rules import meaning_of
from mlx_empire.recipe.duration import Duration
from mlx_empire.recipe.explain import leaf_fields, sections
from mlx_empire.recipe.load import MAX_BYTES, parse_recipe
from mlx_empire.recipe.sections import PARTS
from mlx_empire.recipe.text import KeyPath, one_line, parse_yaml, read_small_text, write_new_text
from mlx_empire.report.html import refuse_same_file, refuse_unwritable_file, write_file

HEADING, ITEM = "heading", "item"
PACKING = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
KINDS = ("lora", "dora", "qlora")  # of the kinds of adapters that lines name the last one holds
# What transformers and TRL take where nothing is said, of what a recipe must have. They train all weights where no line
# asks for adapters (`settled`).
LEFT_OUT: dict[str, Any] = {
    "model.path": "models/base",
    "data.sequence_length": 1024,
    "batch.global_size": 8,
    "optimizer.learning_rate": 2e-5,
    "schedule.type": "linear",
    "run.steps": "3ep",
}


@dataclass(frozen=True)
class SourceLine:
    """A line of the file: its number, the key and what it says, and what it means here."""

    number: int
    key: str
    value: Any
    meaning: Meaning

    def told(self) -> str:
        """What stands in the recipe for it, and why."""
        keys = ", ".join(f"{key}: {_written(value)}" for key, value in self.meaning.keys.items())
        return "; ".join(filter(None, (keys, self.meaning.why)))


def import_command(options: argparse.Namespace) -> int:
    """What the command line asks for; returns the exit code."""
    with guard(None):
        choose_device()
        out = options.out or Path(f"{options.file.stem}.recipe.yaml")
        refuse_same_file({"--out": out, "--json": options.json})
        refuse_unwritable_file("--json", options.json, [options.file])
        lines = read_lines(options.file)
        values = {"data.path": str(options.data)}
        if options.model is not None:
            values["model.path"] = str(options.model)
        lines, keys, added = settled(lines, values, {**LEFT_OUT, "run.dir": f"runs/{options.file.stem}"})
        text = recipe_text(options.file, lines, keys, {key: _origin(key, values) for key in added})
        parse_recipe(text, str(out))
        packed = any(line.key.rpartition(".")[2] in PACKING for line in lines)
        error = packing_error(Path(str(keys["model.path"]))) if packed else None
        write_new_text(out, text)
        show_lines(options.file, lines, added)
        if error is not None:
            print(error.sentence())
        if options.json is not None:
            told = [
                {"line": one.number, "key": one.key, "verdict": one.meaning.verdict, "keys": one.meaning.keys,
                 "why": one.meaning.why} for one in lines
            ]  # fmt: skip
            document = {"lines": told, "added": added, "error": None if error is None else vars(error)}
            write_file("--json", options.json, json.dumps(document, indent=1) + "\n")
        print(f"written: {out}\n  mlx-empire capacity {shlex.quote(str(out))}")
    return 0


def read_lines(file: Path) -> list[SourceLine]:
    """Every line of a configuration that says something, in order. UserError for a file that holds none."""
    text = read_small_text(file, "configuration", MAX_BYTES, "give a YAML or JSON file of another trainer")
    value, places = parse_yaml(text, str(file))
    if not isinstance(value, dict) or not value:
        raise UserError(f"{file}:1: no keys are in it; expected those of a configuration")
    leaves = dict(_leaves(value, ()))
    told = {str(path[-1]): leaf for path, leaf in leaves.items()}
    found: dict[KeyPath, SourceLine] = {}
    for path, number in sorted(places.items(), key=lambda pair: (pair[1], len(pair[0]))):
        key = ".".join(path)
        listed = next((path[:depth] for depth in range(1, len(path)) if path[:depth] in leaves), None)
        if listed is not None:
            found[path] = SourceLine(number, key, ITEM, Meaning(found[listed].meaning.verdict))
        elif path in leaves:
            found[path] = SourceLine(number, key, leaves[path], _meaning(str(path[-1]), leaves[path], told))
        elif path:
            found[path] = SourceLine(number, key, HEADING, Meaning(HEADING))
    return list(found.values())


def _leaves(value: Mapping[Any, Any], path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _leaves(inner, (*path, key))
        else:
            yield (*path, key), inner


def _meaning(name: str, value: Any, told: Mapping[str, Any]) -> Meaning:
    """The meaning of a key, if its value is one that the key here can have."""
    try:
        found = meaning_of(name, value, told)
    except (TypeError, ValueError, OverflowError, OSError):
        return Meaning(NOT_POSSIBLE, {}, f"{value!r:.40} is no value that can be read")
    for key, setting in found.keys.items():
        if (wrong := _wrong(key, setting)) is not None:
            return Meaning(NOT_POSSIBLE, {}, wrong)
    return found


def _wrong(key: str, value: Any) -> str | None:
    """Why a value cannot stand in a recipe; None where it can."""
    least = {"model.path": "m", "data.path": "d", "data.sequence_length": 8, "batch.global_size": 1,
             "optimizer.learning_rate": 1.0, "run.dir": "r", "run.steps": 1000000, key: value}  # fmt: skip
    if key == "batch.micro_size":
        least["batch.global_size"] = value
    if key.startswith("tuning.") and key != "tuning.type":
        least["tuning.type"] = {"bits": "qlora", "unfrozen_parameters": "full"}.get(
            key.partition(".")[2], "lora"
        )
    try:
        parse_recipe(_sections(least, {}), "x")
    except UserError:
        return f"{key}: expected {leaf_fields()[key].description}"
    return None


def settled(
    lines: Sequence[SourceLine], values: Mapping[str, Any], left_out: Mapping[str, Any] = LEFT_OUT
) -> tuple[list[SourceLine], dict[str, Any], dict[str, Any]]:
    """The lines, some of which another goes before; all keys of the recipe; and those of them that no line decides.

    `values`: what the command line says, which goes before the file; `left_out`: what stands where neither says
    anything. A line of which one key gives way says nothing at all, so no half of it is in the recipe.
    """
    deciding = _deciding(lines)
    named = {key for line in lines for key in line.meaning.keys if key.startswith("tuning.")}
    adapters = "lora" if named - {"tuning.type", "tuning.bits", "tuning.unfrozen_parameters"} else "full"
    kind = adapters if deciding is None else deciding.meaning.keys["tuning.type"]
    keys: dict[str, Any] = {**values} if deciding is None else {"tuning.type": kind, **values}
    by: dict[str, SourceLine] = {} if deciding is None else {"tuning.type": deciding}
    found = []
    for line in lines:
        own = line.meaning.keys
        over = [key for key, value in own.items() if keys.get(key, value) != value]
        if kind in KINDS and own.get("tuning.type") == "lora":
            over = [key for key in over if key != "tuning.type"]
        if over:
            meaning = _given_way(over[0], keys[over[0]], by.get(over[0]))
        elif idle := next((key for key in own if _idle(key, kind)), None):
            meaning = Meaning(MAPPED, {}, f"{idle} says nothing where tuning.type is {kind}")
        else:
            meaning = line.meaning
            for key, value in own.items():
                keys.setdefault(key, value)
                by.setdefault(key, line)
        found.append(SourceLine(line.number, line.key, line.value, meaning))
    added = {**left_out, "tuning.type": kind, **values}
    if "batch.micro_size" in keys and "batch.global_size" not in keys:
        added["batch.global_size"] = keys["batch.micro_size"]
    added = {key: value for key, value in added.items() if key not in keys or key in values}
    return found, keys | added, added


def _deciding(lines: Sequence[SourceLine]) -> SourceLine | None:
    """The line that says what is trained: the first; where that wants adapters, the one whose kind packs most."""
    asking = [line for line in lines if "tuning.type" in line.meaning.keys]
    if not asking or asking[0].meaning.keys["tuning.type"] not in KINDS:
        return asking[0] if asking else None
    adapters = [line for line in asking if line.meaning.keys["tuning.type"] in KINDS]
    return max(adapters, key=lambda line: KINDS.index(line.meaning.keys["tuning.type"]))


def _idle(key: str, kind: str) -> bool:
    """Whether a recipe of this kind may not have the key; there too it decides nothing then."""
    section, name = key.split(".")
    if section != "tuning" or name == "type":
        return False
    if kind == "full":
        return name not in PARTS
    return name == "unfrozen_parameters" or (name == "bits" and kind != "qlora")


def _given_way(key: str, value: Any, before: SourceLine | None) -> Meaning:
    """The verdict of a line whose `key` has another `value`: that of the line `before`, or the command line's."""
    if before is None:
        return Meaning(REPLACED, {}, f"{key}: the command line says {_written(value)}")
    return Meaning(NOT_POSSIBLE, {}, f"{key}: line {before.number} says {_written(value)}")


def _origin(key: str, values: Mapping[str, Any]) -> str:
    return "from the command line" if key in values else "not said there"


def recipe_text(
    file: Path, lines: Sequence[SourceLine], keys: Mapping[str, Any], added: Mapping[str, str]
) -> str:
    """The recipe, with the line that each key comes from; `added`: whence those come that no line decides."""
    comments = dict(added)
    for line in lines:
        for key in line.meaning.keys:
            if key not in added:
                comments.setdefault(key, one_line(f"line {line.number}: {line.key}"))
    head = f"# Made by `mlx-empire import {file.name}`. `mlx-empire keys` tells what every key decides."
    return f"{one_line(head)}\n" + _sections(keys, comments)


def _sections(keys: Mapping[str, Any], comments: Mapping[str, str]) -> str:
    found = []
    for section in sections():
        own = {key: value for key, value in keys.items() if key.partition(".")[0] == section}
        found += [f"{section}:"] if own else []
        for key, value in own.items():
            comment = f"  # {comments[key]}" if key in comments else ""
            found.append(f"  {key.partition('.')[2]}: {_written(value)}{comment}")
    return "\n".join(found) + "\n"


def _written(value: Any) -> str:
    """A value as YAML on one line, which JSON is; a length as it is written."""
    return str(value) if isinstance(value, Duration) else json.dumps(value, ensure_ascii=False)


def show_lines(file: Path, lines: Sequence[SourceLine], added: Mapping[str, Any]) -> None:
    """The lines as a table, and how many of each kind there are. What a file says is no markup."""
    table = Table(title=Text(str(file), "table.title"), title_justify="left")
    table.add_column("line", justify="right")
    table.add_column("there", overflow="fold")
    table.add_column("verdict")
    table.add_column("here", overflow="fold")
    for line in lines:
        if line.value in (HEADING, ITEM):
            continue
        said = f"{line.key.rpartition('.')[2]}: {_written(line.value)}"
        table.add_row(str(line.number), Text(said), line.meaning.verdict, Text(line.told() or MAPPED))
    Console().print(table)
    counts = Counter(line.meaning.verdict for line in lines)
    print(f"{len(lines)} lines: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}")
    print("not said there: " + ", ".join(f"{key}={_written(value)}" for key, value in added.items()))
