"""A run's result, `final/`: asked for before the first step, and never refused to a run that has done its steps.

What can be known without weights is refused at the start. Whatever a disk or a person's files say against the result at
the end is waited for, on all ranks together and with the weights in memory: first old checkpoints give up their room
(`checkpoint.retention`), then somebody has to make some. A run that waits can be stopped as at the border of a step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlx_empire import progress
from mlx_empire.checkpoint.paths import step_name
from mlx_empire.checkpoint.save import Saver
from mlx_empire.comm.failure import together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.disk import disk_of, free_bytes, is_full, replace_private
from mlx_empire.engine.store import ShardStore
from mlx_empire.errors import NoRoomError, UserError
from mlx_empire.evaluation.gate import GateKeeper
from mlx_empire.formats.adapter_folder import AdapterWriter
from mlx_empire.formats.export_folder import FolderWriter, plan_export
from mlx_empire.formats.fetched import source_of
from mlx_empire.formats.hf_folder import has_weights, open_folder
from mlx_empire.formats.hf_names import huggingface_names
from mlx_empire.formats.model_card import model_card
from mlx_empire.formats.packing_table import TABLE_NAME, PackingTable
from mlx_empire.formats.seal import is_sealed, seal_folder, sealed_digest, unseal
from mlx_empire.formats.staging import refuse_foreign, refuse_uncopied, remove, write_json
from mlx_empire.model.target import Target
from mlx_empire.model.ternary import folded
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.metrics import read_metrics
from mlx_empire.report.run import RunReport
from mlx_empire.run.launched import COMPLETE

POLL_SECONDS = 2.0
SIGNS_OF_LIFE = 8  # in that time, for the watchdog
LONGEST_PAUSE_SECONDS = 600.0  # between attempts that write much and fail; and between two lines that say so
MODEL, ADAPTERS = "the trained model is", "the trained adapters are"


# ---- before the first step


def refuse_taken(recipe: Recipe) -> None:
    """UserError where `final/` holds what a run may not replace; what it froze just before it was killed it may."""
    unfinished = (recipe.run.dir / "metrics.jsonl").exists()
    if not (unfinished and is_sealed(final_of(recipe))):
        refuse_foreign(final_of(recipe))


def refuse_result(recipe: Recipe, target: Target) -> None:
    """UserError where the result could not be written however much room there is, from names and shapes alone."""
    sealed_digest(recipe.model.path)
    if target.adapters is None:
        if (folder := _source_folder(recipe)) is not None:
            refuse_uncopied(folder)
        plan_export(final_of(recipe), target.base, target.rebuild, folder)


# ---- writing


def final_of(recipe: Recipe) -> Path:
    """Where the result goes."""
    return recipe.run.dir / "final"


def result_writer(recipe: Recipe, target: Target) -> FolderWriter | AdapterWriter:
    """What writes `final/`: the whole model as a folder of its own, or adapters alone. UserError, NoRoomError."""
    out, folder = final_of(recipe), recipe.model.path
    unseal(out)  # a kill came between freezing it and COMPLETE
    writer: FolderWriter | AdapterWriter
    if target.adapters is not None:
        stored = open_folder(folder) if has_weights(folder) else None
        names = huggingface_names(target.base, stored, target.spec.adapted)
        writer = AdapterWriter(out, target.spec, target.adapters, str(folder), huggingface=names)
    else:
        writer = FolderWriter(out, target.base, target.rebuild, _source_folder(recipe))
    try:
        plan = json.loads((recipe.run.dir / "plan.json").read_text())
        data, base = str(plan["data_digest"]), recipe.model.base_digest or sealed_digest(folder)
        metrics, source = read_metrics(recipe.run.dir), source_of(recipe)
        writer.card = model_card(recipe, target.spec, metrics, data, base, source, plan.get("start"))
    except (OSError, ValueError, KeyError) as error:  # somebody's hand: the weights matter more than the card
        writer.notes.append(f"no model card was written: {error}")
    return writer


def write_final(recipe: Recipe, target: Target, store: ShardStore, comm: Communicator) -> Refusal | list[str]:
    """Write `final/` unit by unit: every rank joins the gathers, rank 0 writes. Collective.

    Returns what there is to say; or why it could not be written, with nothing left of the attempt.
    """
    writer: FolderWriter | AdapterWriter | None = None
    table = PackingTable()

    def begin() -> None:
        nonlocal writer
        progress.reach("finish")
        writer = result_writer(recipe, target)

    def write(index: int) -> None:
        assert writer is not None
        tensors = store.tensors(index)
        plain = folded(tensors)
        writer.write_unit(index, plain)
        table.add_trained(target.spec.units[index], tensors, plain)

    def close() -> None:
        assert writer is not None
        if target.ternary and isinstance(writer, FolderWriter):
            writer.beside[TABLE_NAME] = table.to_json()
            writer.notes.append(table.sentence())
        writer.close()

    if comm.rank > 0:
        progress.reach("finish")
    refusal = attempted(comm, begin)
    try:
        for index in range(len(target.spec.units)):
            if refusal is not None:
                break
            store.bind(index)
            refusal = attempted(comm, partial(write, index))
            store.free(index)
        refusal = refusal or attempted(comm, close)
    finally:
        if writer is not None:
            with suppress(OSError):
                writer.discard()  # nothing is left of it where it was closed
    if refusal is not None:
        return refusal
    notes = writer.notes if writer is not None else []
    return [*notes, f"{MODEL if target.adapters is None else ADAPTERS} in {final_of(recipe)}"]


def seal(recipe: Recipe, gate: GateKeeper) -> list[str]:
    """Freeze `final/` if the gate was reached, then write `COMPLETE`; what there is to say. On rank 0; repeatable."""
    said = [gate.sentence()] if gate.asks else []
    if gate.reached:
        unseal(final_of(recipe))
        said.append(_freeze(recipe, gate))
        progress.reach("freeze")
    replace_private(recipe.run.dir / COMPLETE, "\n")
    return said


def _freeze(recipe: Recipe, gate: GateKeeper) -> str:
    """Freeze `final/` and record it as a base in `BASE.json`; returns a sentence for the user."""
    final = final_of(recipe)
    about = {
        "gate": gate.sentence(),
        "trained_from": str(recipe.model.path),
        "trained_from_digest": recipe.model.base_digest or sealed_digest(recipe.model.path),
    }
    digest = seal_folder(final, about)
    remove(recipe.run.dir / "BASE.json")
    write_json(recipe.run.dir / "BASE.json", {"path": str(final), "digest": digest, **about})
    if recipe.tuning.type != "full":
        return f"{final} is frozen as {digest}; another adapter goes on from it by tuning.start: {recipe.run.dir}"
    return f"{final} is frozen; a recipe builds on it by model.path: {final} and model.base_digest: {digest}"


def _source_folder(recipe: Recipe) -> Path | None:
    return recipe.model.path if recipe.model.path.is_dir() else None


# ---- waiting


@dataclass(frozen=True)
class Refusal:
    """Why something could not be written, the same on all ranks; `needed`: bytes, 0 where a disk was full all the same,
    None where it was no matter of room.
    """

    why: str
    needed: int | None


def attempted(comm: Communicator, work: Callable[[], None]) -> Refusal | None:
    """Rank 0 does `work`; what a disk or a person's files said against it, on all ranks. Collective.

    Other errors of ours are agreed: they end the run.
    """
    found = None
    with together(comm):
        if comm.rank == 0:
            try:
                work()
            except NoRoomError as error:
                found = [str(error), error.needed]
            except UserError as error:
                found = [str(error), None]
            except OSError as error:
                found = [str(error), 0 if is_full(error) else None]
    answer = comm.broadcast_json(found)
    return None if answer is None else Refusal(*answer)


@dataclass(frozen=True)
class Patience:
    """Repeats what is refused, on all ranks together. `border`: raises where the run was asked to stop. Collective."""

    comm: Communicator
    place: Path
    report: RunReport
    saver: Saver
    border: Callable[[], None]

    def until_written(self, attempt: Callable[[], Refusal | list[str]]) -> None:
        """Call `attempt` until it says what there is to say, and say it."""
        pause, told = POLL_SECONDS, -LONGEST_PAUSE_SECONDS
        while isinstance(found := attempt(), Refusal):
            until = time.monotonic() + pause
            if not found.needed:
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            while not self._try_again(found.needed, until):
                if time.monotonic() - told >= LONGEST_PAUSE_SECONDS:
                    if told < 0:  # once is enough for whoever is elsewhere
                        self.report.notify("disk", self._waiting(found))
                    told = time.monotonic()
                    self.report.message(self._waiting(found))
                for _ in range(SIGNS_OF_LIFE):
                    time.sleep(POLL_SECONDS / SIGNS_OF_LIFE)
                    progress.advance()
                self.border()
        self.report.messages(found)

    def _try_again(self, needed: int | None, until: float) -> bool:
        """Whether what was refused may be possible now; old checkpoints are given up for it."""
        mine = None
        if self.comm.rank == 0:
            mine = [
                disk_of(self.place, self.comm.hostname),
                free_bytes(self.place),
                time.monotonic() >= until,
            ]
        disk, free, late = self.comm.broadcast_json(mine)
        if free >= needed if needed else late:
            return True
        if needed is None:
            return False
        given_up = self.saver.give_up_for(disk, max(needed, free + 1))
        self.report.messages(given_up)
        return bool(given_up)

    def _waiting(self, refusal: Refusal) -> str:
        newest = self.saver.newest
        saved = f"{step_name(newest)} is saved" if newest else "no checkpoint is saved yet"
        remedy = "mend that" if refusal.needed is None else "free some room"
        return (
            f"WAITING: {refusal.why}: the run waits with the weights in memory; {remedy}, or stop it ({saved}; what is "
            "not, is saved first)"
        )


def until_there_is_room(write: Callable[[], object], tell: Callable[[str], None]) -> None:
    """Call `write` until no disk is too full for it; other errors are raised. For one process alone."""
    told = False
    while True:
        try:
            write()
            return
        except (NoRoomError, OSError) as error:
            if isinstance(error, OSError) and not is_full(error):
                raise
            if not told:
                tell(f"waits for room: {error}")
            told = True
        time.sleep(POLL_SECONDS)
