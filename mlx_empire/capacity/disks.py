"""Decides how the disk ledger is told: in words, as rows of a table, as JSON; and what to change where a disk is short.

Changes are tried in order, cheapest first: fewer checkpoints and no copies where all that is asked for does not fit;
smaller optimizer states, adapters alone, or room where the least does not. Every setting can be typed and was planned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from mlx_empire.capacity.whatif import Advice, Settings
from mlx_empire.plan.disk import FORMULAS, DiskLedger, disk_verdict
from mlx_empire.recipe.changes import adapters_of, typed, variant
from mlx_empire.recipe.schema import Recipe
from mlx_empire.sizes import amount

_COLUMNS = (
    "disk",
    "checkpoint",
    "copies",
    "at once",
    "result",
    "base",
    "inputs",
    "token cache",
    "asked for",
    "least",
    "free",
    "verdict",
)
Again = Callable[
    [Recipe], tuple[str, Sequence[DiskLedger]]
]  # the verdict of a changed recipe's memory, and its disks


def disk_columns(ledgers: Sequence[DiskLedger]) -> list[str]:
    """The columns of the table, without that of layers' inputs where none go to a file."""
    return [name for name in _COLUMNS if name != "inputs" or any(one.inputs for one in ledgers)]


def disk_rows(ledgers: Sequence[DiskLedger]) -> list[list[str]]:
    """What `disk_columns` say of each file system."""
    shown = [name in disk_columns(ledgers) for name in _COLUMNS]
    return [[cell for cell, is_shown in zip(row, shown, strict=True) if is_shown] for row in _rows(ledgers)]


def _rows(ledgers: Sequence[DiskLedger]) -> list[list[str]]:
    return [
        [
            one.name,
            amount(one.checkpoint) if one.checkpoint else "-",
            amount(one.copies) if one.copies else "-",
            f"{one.keeping.asked}" if one.keeping.asked else "-",
            amount(one.result) if one.result else "-",
            amount(one.base) if one.base else "-",
            amount(one.inputs) if one.inputs else "-",
            amount(one.tokens) if one.tokens else "-",
            amount(one.asked),
            amount(one.least),
            amount(one.free) if one.free is not None else "not known",
            one.verdict or "-",
        ]
        for one in ledgers
    ]


def disk_documents(ledgers: Sequence[DiskLedger]) -> list[dict[str, object]]:
    """The disk ledgers as JSON; what is not known is null."""
    return [
        {
            "name": one.name,
            "checkpoint_bytes": one.checkpoint,
            "copies_bytes": one.copies,
            "checkpoints_at_once": one.keeping.asked,
            "result_bytes": one.result,
            "base_bytes": one.base,
            "token_cache_bytes": one.tokens,
            "asked_bytes": one.asked,
            "least_bytes": one.least,
            "free_bytes": one.free,
            "verdict": one.verdict,
            "reason": one.reason,
            "layer_inputs_bytes": one.inputs,
        }
        for one in ledgers
    ]


def disk_notes(ledgers: Sequence[DiskLedger]) -> list[str]:
    """What the columns mean, those that occur, and what is short."""
    used = {
        "checkpoint": any(one.checkpoint for one in ledgers),
        "copies": any(one.copies for one in ledgers),
        "at once": any(one.keeping.asked for one in ledgers),
        "result": any(one.result for one in ledgers),
        "base": any(one.base for one in ledgers),
        "inputs": any(one.inputs for one in ledgers),
        "token cache": any(one.tokens for one in ledgers),
    }
    notes = [f"{name}: {FORMULAS[name]}" for name, occurs in used.items() if occurs]
    if len({one.disk.partition(":")[0] for one in ledgers}) > 1:
        notes.append(
            "a disk on a network that several machines share cannot be told from their own here, so each counts it for "
            "itself; when the run begins it is found by probe files, and counted once"
        )
    if any(one.free is None for one in ledgers):
        notes.append(
            "what is free on a machine that is not this one: write disk=1TB into its line of the hostfile"
        )
    return notes


def disk_advice(recipe: Recipe, ledgers: Sequence[DiskLedger], again: Again) -> list[Advice]:
    """What makes the disks do, cheapest first; nothing where they do, or nobody knows."""
    verdict = disk_verdict(ledgers)
    if verdict == "fits":
        return []
    found = [
        entry
        for settings in _settings(recipe, verdict)
        if (entry := _tried(recipe, settings, verdict, again))
    ]
    return [*found[:1], *(_room(one) for one in ledgers if one.verdict == verdict)]


def _settings(recipe: Recipe, verdict: str) -> Iterator[Settings]:
    """Settings that take less of a disk, those that cost least first."""
    optimizer, full = recipe.optimizer, recipe.tuning.type == "full"
    if recipe.memory.activation_offload is not False:
        yield {"memory.activation_offload": False}
    if verdict == "tight":
        no_copies: Settings = {"run.buddy": False} if recipe.run.buddy is not False else {}
        fewer: list[Settings] = [
            {"run.keep_last": count} for count in range((recipe.run.keep_last or 4) - 1, 0, -1)
        ]
        yield from fewer
        if no_copies:
            yield no_copies
            yield from ({**no_copies, **one} for one in fewer)
    small: Settings = {"optimizer.state_bits": 8} if optimizer.state_bits != 8 else {}
    if optimizer.master_weights in ("exact", "fp32") and full:
        small_master: Settings = {"optimizer.master_weights": "diet"}
    else:
        small_master = {}
    yield from (one for one in (small, small_master, {**small, **small_master}) if one)
    if full:
        yield adapters_of(recipe, {"tuning.type": "lora"})


def _tried(recipe: Recipe, settings: Settings, before: str, again: Again) -> Advice | None:
    """The settings as advice, if they help the disks and the memory allows them."""
    memory, ledgers = again(variant(recipe, settings))
    after = disk_verdict(ledgers)
    if memory == "no" or after == "no" or after == before:
        return None
    worst = max(ledgers, key=lambda one: one.asked / one.free if one.free else 0)
    shown = f"the disk of {worst.name} then needs {amount(worst.asked)}"
    free = f" of {amount(worst.free)} free" if worst.free is not None else ""
    note = "; adapters only: the base stays as it is" if "tuning.type" in settings else ""
    return Advice(typed(settings), shown + free + note, after)


def _room(one: DiskLedger) -> Advice:
    """How much more room makes a disk do."""
    assert one.free is not None
    wanted = one.least if one.verdict == "no" else one.asked
    where = "run.checkpoints" if one.checkpoint else "run.dir"
    effect = f"or {where} on another one: {amount(wanted)} needed, {amount(one.free)} free"
    return Advice(
        f"free {amount(wanted - one.free)} on the disk of {one.name}",
        effect,
        "tight" if one.verdict == "no" and wanted < one.asked else "fits",
    )
