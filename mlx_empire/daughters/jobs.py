"""Many daughters as names: which folder holds the data of each, on which machine it is, and in which state.

Workers tell what happens in lines of JSON on their standard output; `Jobs` is what the lines add up to.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_empire.errors import UserError
from mlx_empire.recipe.schema import Recipe
from mlx_empire.recipe.text import one_line
from mlx_empire.run.launched import COMPLETE

WAITING, TRAINING, DONE, BEFORE, FAILED, LOST = "waiting", "training", "done", "done before", "failed", "lost"
CHANGED = "changed"  # finished before, by another recipe or on other rows
FINISHED = (DONE, BEFORE)
MARK = "@daughter "  # begins a worker's line about one
MOST_PEOPLE = 100_000


@dataclass
class JobState:
    """What is known of one daughter. `left`: seconds, as far as its steps so far tell."""

    name: str
    machine: str = "-"
    state: str = WAITING
    step: int = 0
    steps: int = 0
    held_out: float | None = None
    before: float | None = None
    note: str = ""
    began: float = 0.0
    first_step: int = 0

    @property
    def left(self) -> float | None:
        """Seconds until its last step; None while that is not known."""
        done = self.step - self.first_step
        if self.state != TRAINING or done <= 0:
            return None
        return (time.monotonic() - self.began) / done * (self.steps - self.step)


@dataclass
class Jobs:
    """All daughters by name, and the lines of the workers that were about none of them."""

    states: dict[str, JobState] = field(default_factory=dict)

    def take(self, line: str) -> bool:
        """Take a worker's line in; False if it is about no daughter."""
        if not line.startswith(MARK):
            return False
        try:
            event = json.loads(line.removeprefix(MARK))
            state = self.states.setdefault(str(event["name"]), JobState(str(event["name"])))
        except (ValueError, KeyError, TypeError):
            return False
        if event.get("state") == TRAINING and state.state != TRAINING:
            state.began, state.first_step = time.monotonic(), int(event.get("step", 0))
        for key in ("machine", "state", "step", "steps", "held_out", "before", "note"):
            if key in event:
                setattr(state, key, event[key])
        return True

    def end(self) -> None:
        """The workers have ended: whoever was being trained is lost, and the next time goes on or begins anew."""
        for state in self.states.values():
            if state.state in (WAITING, TRAINING):
                state.state = LOST

    @property
    def finished(self) -> int:
        """How many daughters there are."""
        return sum(state.state in FINISHED for state in self.states.values())


def event(name: str, **fields: Any) -> str:
    """A worker's line."""
    return MARK + json.dumps({"name": name, **fields})


def chosen_of(folder: Path, only: Sequence[str]) -> list[str]:
    """The people of a folder, or of them `only` these where some are named. UserError for a name that is none."""
    names = people_of(folder)
    strange = next((name for name in only if name not in names), None)
    if strange is not None:
        raise UserError(
            f"--only: {strange}: there is no {folder / strange}; there are {', '.join(names[:20])}"
        )
    return [name for name in names if not only or name in only]


def people_of(folder: Path) -> list[str]:
    """The names of the sub-folders with data of one person each, sorted. UserError without any."""
    if not folder.is_dir():
        raise UserError(f"--people: {folder}: no such folder; give one with a sub-folder for each person")
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    odd = [name for name in names if one_line(name) != name]
    if odd:
        raise UserError(f"--people: {folder}: {odd[0]!a} is no name for a folder of results; rename it")
    if not names:
        raise UserError(f"--people: {folder}: no sub-folders; each person's data lies in one, as train.jsonl")
    if len(names) > MOST_PEOPLE:
        raise UserError(f"--people: {folder}: more than {MOST_PEOPLE} sub-folders")
    return names


def recipe_for(recipe: Recipe, people: Path, name: str) -> Recipe:
    """The recipe of one daughter: its own data, questions and start, and a folder of its own inside run.dir."""
    data = recipe.data.model_copy(update={"path": people / name})
    run = recipe.run.model_copy(update={"dir": recipe.run.dir / name})
    evaluation = recipe.evaluation.of_person(name)
    start = recipe.tuning.start and Path(str(recipe.tuning.start).replace("{person}", name))
    tuning = recipe.tuning.model_copy(update={"start": start})
    own = {"data": data, "run": run, "evaluation": evaluation, "tuning": tuning}
    return recipe.model_copy(update=own)


def is_finished(recipe: Recipe, name: str) -> bool:
    """Whether a daughter's result lies there whole."""
    return (recipe.run.dir / name / COMPLETE).exists()


def homes_of(kept: Sequence[Sequence[str]]) -> dict[str, int]:
    """Which worker an unfinished daughter returns to; `kept`: by worker, those that its machine had. Several workers
    on one machine share them out.
    """
    seen: dict[str, list[int]] = {}
    for rank, names in enumerate(kept):
        for name in names:
            seen.setdefault(name, []).append(rank)
    return {name: ranks[i % len(ranks)] for i, (name, ranks) in enumerate(seen.items())}


def deal(
    names: Sequence[str],
    weights: Mapping[str, int],
    places: Sequence[int],
    homes: Mapping[str, int] | None = None,
) -> list[list[str]]:
    """Which daughter is trained on which machine: the heaviest first, each to the machine that would be done soonest.

    weights: bytes of data by name. places: how many daughters each machine trains together; a machine with none gets
    nobody. homes: the machine that has what a daughter needs to go on. UserError where no machine has a place.
    """
    homes = homes or {}
    if not any(places):
        raise UserError("no machine has room for a single daughter; see mlx-empire capacity ...")
    load = [0.0] * len(places)
    dealt: list[list[str]] = [[] for _ in places]
    for name in sorted(names, key=lambda n: (-weights.get(n, 1), n)):
        weight = max(weights.get(name, 1), 1)
        open_to = [r for r, count in enumerate(places) if count]
        home = min(
            [r for r in open_to if r == homes.get(name)] or open_to,
            key=lambda r: ((load[r] + weight) / places[r], r),
        )
        load[home] += weight
        dealt[home].append(name)
    return dealt
