"""What guards a run around its training: ranks that agree on what they are about to do, collectives that give right
answers, one run per folder.

Decides the order of these checks; each lives in its own module. Everything here comes before anything is allocated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mlx_empire.checkpoint.folder import has_weights, model_digest
from mlx_empire.comm.failure import together
from mlx_empire.comm.handshake import Facts, environment, shake_hands
from mlx_empire.comm.protocol import Communicator
from mlx_empire.comm.selftest import self_test
from mlx_empire.comm.watchdog import Watchdog
from mlx_empire.engine.spikes import SpikeWatch
from mlx_empire.errors import EmpireError
from mlx_empire.recipe.explain import leaf_fields
from mlx_empire.recipe.load import MAX_BYTES, dump_recipe, load_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.recipe.text import read_small_text
from mlx_empire.run_lock import RunLock


def greet(comm: Communicator, recipe_path: Path, overrides: Sequence[str]) -> None:
    """UserError with a table where ranks differ in what they run or in what they were asked for. Collective.

    Rank 0's recipe is the one that counts; another rank's file at the same path must ask for the same, so that an
    old copy is noticed. A rank without the file does not mind.
    """
    shake_hands(comm, environment(), "install the same versions on every machine")
    text = _text(recipe_path)
    digest = None if text is None else hashlib.sha256(text.encode()).hexdigest()
    known = [answer for answer in comm.gather_json([digest, *overrides]) if answer[0] is not None]
    if any(answer != known[0] for answer in known):
        remedy = f"copy {recipe_path} to every machine again and start all ranks with one command line"
        shake_hands(comm, _asked_for(recipe_path, overrides), remedy)


def agree_on_model(comm: Communicator, recipe: Recipe) -> None:
    """UserError naming a rank whose model is damaged, or with a table where ranks have different ones. Collective."""
    folder, fact = recipe.model.path, None
    with together(comm):
        if recipe.model.init == "pretrained" and has_weights(folder):
            fact = model_digest(folder, contents=recipe.model.compare == "contents")[:16]
    shake_hands(comm, {"model digest": fact}, f"copy {folder} to every machine again")


def spike_watch(recipe: Recipe) -> SpikeWatch:
    """What watches loss and gradient norm."""
    numerics = recipe.numerics
    return SpikeWatch(numerics.spikes, numerics.threshold, numerics.window, numerics.max_skips)


class Safeguards:
    """What stands guard until the run ends; `notes` are for the user once there is a report."""

    def __init__(self, comm: Communicator, stack: ExitStack) -> None:
        self._comm, self._stack = comm, stack
        self.notes: list[str] = []

    def lock(self, folder: Path) -> None:
        """Hold the run's folder from here on. UserError naming the holder if another run does. Collective."""
        with together(self._comm):
            if self._comm.rank == 0:
                held = self._stack.enter_context(RunLock(folder))
                self.notes += [held.note] if held.note else []


@contextmanager
def standing(comm: Communicator, recipe: Recipe) -> Iterator[Safeguards]:
    """The safeguards of a run, from its first collective to its end. Collective."""
    with ExitStack() as stack:
        stack.enter_context(Watchdog(comm, recipe.comm.deadline_seconds, recipe.comm.deadline_floor_seconds))
        self_test(comm)
        yield Safeguards(comm, stack)


def _text(path: Path) -> str | None:
    """What this rank's own recipe file says; None where it has none."""
    try:
        return read_small_text(path, "recipe", MAX_BYTES, "")
    except EmpireError:
        return None


def _asked_for(path: Path, overrides: Sequence[str]) -> Facts:
    """Every key of the recipe as this rank reads it; nothing where it has no file."""
    if _text(path) is None:
        return {}
    try:
        lines = dump_recipe(load_recipe(path, overrides)).splitlines()
    except EmpireError as error:
        return {"recipe": str(error).removeprefix(f"{path}:")}
    facts: dict[str, str | None] = {"recipe": "can be used", **dict.fromkeys(leaf_fields(), "null")}
    section = ""
    for line in lines:
        key, _, value = line.partition(":")
        if key.startswith(" "):
            facts[f"{section}.{key.strip()}"] = value.strip()
        else:
            section = key
    return facts
