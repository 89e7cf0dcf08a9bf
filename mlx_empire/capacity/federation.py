"""`capacity --federation FILE --hosts HOSTFILE`: the file's models on the hostfile's machines, as tables and JSON.

Decides how the file is read (YAML: `models`, and `context` positions of a conversation), and how large what it names
is: a catalog's model at 16 bits with its cache, an adapter of a base at its rank, or a size as written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console

from mlx_empire.capacity.document import Document
from mlx_empire.capacity.text import plain_table
from mlx_empire.cluster.hostfile import Node
from mlx_empire.errors import UserError
from mlx_empire.model import catalog
from mlx_empire.model.spec import ModelSpec
from mlx_empire.model.target import catalog_target
from mlx_empire.plan.chips import chip_of
from mlx_empire.plan.federation import Federation, Member, ModelHost, adapters_held, federate, fitting_models
from mlx_empire.plan.hardware import wire_of
from mlx_empire.plan.serving import PACKED, cache_bytes_per_token, resting_bytes, serving_room
from mlx_empire.recipe.changes import variant
from mlx_empire.recipe.load import load_recipe
from mlx_empire.recipe.packaged import recipe_file
from mlx_empire.recipe.text import one_line, parse_yaml, read_small_text
from mlx_empire.report.text import span
from mlx_empire.sizes import amount

MOST_BYTES = 64 * 1024
EXAMPLE = "models: {writer: {model: llama-3.1-8b, weight: 2}, notes: {size: 13.4GB, hot: false}}"
_UNITS = {"GB": 10**9, "MB": 10**6, "GiB": 2**30, "MiB": 2**20}


class ModelRow(BaseModel):
    """A model of the file: `model` of the catalog, `size`, or an adapter of `base` with `rank`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    size: Annotated[str, Field(pattern=r"^\d+(\.\d+)? ?(GB|MB|GiB|MiB)$")] | None = None
    base: str | None = None
    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    weight: Annotated[int | float, Field(gt=0, le=1e6)] = 1
    hot: bool = True


class FederationFile(BaseModel):
    """The file: models by name, and how many positions a conversation with each may have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    models: Annotated[dict[str, ModelRow], Field(min_length=1, max_length=1000)]
    context: Annotated[int, Field(ge=0, le=1 << 24)] = 4096


@dataclass(frozen=True)
class FederationSurvey:
    """What was asked, and where it all lives. `whole`: bytes of the largest model, `cache` beside it, `adapter` of it
    at rank 16 (0 where its size alone is known)."""

    federation: Federation
    nodes: Sequence[Node]
    places: Sequence[ModelHost]
    whole: int
    cache: int
    adapter: int


def read_file(path: Path) -> FederationFile:
    """The file. UserError, one line with the place, for anything malformed."""
    remedy = f"--federation takes a YAML file such as {EXAMPLE}"
    value, lines = parse_yaml(read_small_text(path, "federation", MOST_BYTES, remedy), one_line(str(path)))
    try:
        file = FederationFile.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = tuple(map(str, first["loc"]))
        line = next((lines[key[:n]] for n in range(len(key), -1, -1) if key[:n] in lines), 1)
        raise UserError(f"{path}:{line}: {'.'.join(key) or 'it'}: {first['msg']}; {remedy}") from None
    for name, row in file.models.items():
        if sum(one is not None for one in (row.model, row.size, row.base)) != 1:
            line = lines.get(("models", name), 1)
            raise UserError(
                f"{path}:{line}: models.{name}: says not exactly one of model, size and base; {remedy}"
            )
    return file


def federation_of(file: FederationFile, nodes: Sequence[Node]) -> FederationSurvey:
    """The file's models on the nodes. UserError for a name that the catalog does not have."""
    members, bases, largest = [], dict[str, int](), (0, 0, 0)
    for name, row in file.models.items():
        known = row.model or row.base
        if known is None:
            number, unit = _size(str(row.size))
            member = Member(name, int(number * unit), 0, None, float(row.weight), row.hot)
            largest = max(largest, (member.own, 0, 0))
        else:
            spec = _adapted(known, row.rank)
            whole, adapter = resting_bytes(spec, trained=False), resting_bytes(spec, trained=True)
            cache = file.context * cache_bytes_per_token(spec)
            bases |= {known: whole} if row.base else {}
            own = adapter if row.base else whole
            member = Member(name, own, cache, row.base, float(row.weight), row.hot)
            largest = max(largest, (whole, cache, adapter))
        members.append(member)
    link = wire_of(nodes).rate
    places = [_place(node, link) for node in nodes]
    return FederationSurvey(federate(members, places, bases), nodes, places, *largest)


def _place(node: Node, link: tuple[float, float]) -> ModelHost:
    chip, own = chip_of(node), node.link_bytes_per_second
    return ModelHost(
        node.name,
        serving_room(node.limit_bytes),
        chip.disk_rate if chip else None,
        (own, own) if own else link,
    )


def _size(written: str) -> tuple[float, int]:
    unit = next(name for name in ("GiB", "MiB", "GB", "MB") if written.endswith(name))
    return float(written.removesuffix(unit)), _UNITS[unit]


def _adapted(name: str, rank: int) -> ModelSpec:
    """The catalog's model at 16 bits, with adapters in every linear module."""
    if name not in catalog.names():
        raise UserError(
            f"{name}: not in the catalog; did you mean {catalog.nearest(name)}? Or say size: 13.4GB"
        )
    recipe = variant(load_recipe(recipe_file("scout")), {"tuning.type": "lora", "tuning.rank": rank})
    return catalog_target(name, recipe).spec


def federation_document(survey: FederationSurvey) -> Document:
    """The survey as JSON; sizes in bytes, times in seconds as [low, high]."""
    found = survey.federation
    return {
        "models": [
            {
                "name": home.member.name,
                "hot": home.member.hot,
                "weight": home.member.weight,
                "own_bytes": home.member.own,
                "base": home.member.base,
                "cache_bytes": home.member.cache,
                "node": home.node,
                "disk": home.disk,
                "backup": home.backup,
                "swap_seconds": home.swap and list(home.swap),
                "over_link_seconds": home.over_link and list(home.over_link),
            }
            for home in found.homes
        ],
        "nodes": [
            {
                "name": node.name,
                "memory_bytes": node.memory_bytes,
                "room_bytes": place.room,
                "used_bytes": found.used[node.name],
                "stored_bytes": found.stored[node.name],
                "whole_models": fitting_models(survey.whole, survey.cache, place.room),
                "packed_models": fitting_models(int(PACKED * survey.whole), survey.cache, place.room),
                "adapters": adapters_held(survey.whole, survey.adapter, survey.cache, place.room),
            }
            for node, place in zip(survey.nodes, survey.places, strict=True)
        ],
        "hot_without_room": list(found.hot_without_room),
    }


def print_federation(survey: FederationSurvey, console: Console) -> None:
    """Where each model lives, what each machine holds, and what of the largest model it could hold otherwise."""
    found = survey.federation
    homes = plain_table("where each model lives")
    for name in (
        "model",
        "bytes",
        "in memory of",
        "loaded by",
        "backup on",
        "from its disk",
        "over the link",
    ):
        homes.add_column(name, overflow="fold")
    for home in found.homes:
        size = amount(home.member.own) + (f" over {home.member.base}" if home.member.base else "")
        seconds = [span(pair, " s") if pair else "?" for pair in (home.swap, home.over_link)]
        homes.add_row(
            home.member.name, size, home.node or "-", home.disk or "none can", home.backup or "-", *seconds
        )
    console.print(homes)
    console.print()
    held_here = plain_table("what each machine holds, and how many of the largest model alone")
    for name in (
        "machine",
        "memory",
        "models may fill",
        "filled",
        "on its disk",
        "whole",
        "in 4 bits",
        "adapters",
    ):
        held_here.add_column(name, overflow="fold")
    rows = federation_document(survey)["nodes"]
    assert isinstance(rows, list)
    for row in rows:
        sizes = (row[key] for key in ("memory_bytes", "room_bytes", "used_bytes", "stored_bytes"))
        counts = (f"{row[key]:,}" for key in ("whole_models", "packed_models", "adapters"))
        held_here.add_row(row["name"], *map(amount, sizes), *counts)
    console.print(held_here)
    if found.hot_without_room:
        console.print(f"hot, and without room in any memory: {', '.join(found.hot_without_room)}")
