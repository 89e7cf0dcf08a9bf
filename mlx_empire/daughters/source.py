"""Which job each person's data makes: the first generation or, in continuous mode (`--watch`), the next one.

A next generation begins where rows are new to the one in use, which is what it goes on from (`tuning.start`). One that
was begun and is not complete goes on, unless the rows are others by now: then it begins anew with those. A pinned
daughter learns nothing. Whose base has other weights by now is changed: no adapter of it may go on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mlx_empire.daughters.changed import recipe_differs, rows_differ
from mlx_empire.daughters.generations import ROWS, Generations
from mlx_empire.daughters.jobs import is_finished, recipe_for
from mlx_empire.daughters.promote import judge
from mlx_empire.daughters.rows import Learnt, Offered, of_the_first, of_the_next, rows_of
from mlx_empire.errors import UserError
from mlx_empire.recipe.changes import variant
from mlx_empire.recipe.load import load_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.metrics import read_metrics
from mlx_empire.run.names import CURRENT, FINAL


@dataclass(frozen=True)
class JobSource:
    """The jobs of `recipe` on the data of `people`; `watched`: in continuous mode."""

    recipe: Recipe
    people: Path
    watched: bool = False

    def generations(self, name: str) -> Generations:
        """Those of one daughter."""
        return Generations(self.recipe.run.dir / name)

    def of(self, name: str) -> Recipe:
        """The recipe of a daughter's job."""
        first, own = recipe_for(self.recipe, self.people, name), self.generations(name)
        number = own.unfinished if self.watched and is_finished(self.recipe, name) else None
        return first if number is None else next_recipe(first, own, number)

    def begun(self, name: str, *, goes_on: bool) -> None:
        """The job's folder is there: keep what a first generation learns; one that `goes_on` has kept it. UserError,
        OSError.
        """
        job, own = self.of(name), self.generations(name)
        if job.run.dir == own.place(1) and not (goes_on and own.learnt(1) is not None):
            own.note(1, of_the_first(rows_of(job.data), job.data.validation_split))

    def done(self, name: str) -> str:
        """The job is complete: decide which generation is in use; what there is to say. OSError."""
        return decide_newest(self.generations(name)) if self.watched else ""

    def other_base(self, name: str, base: str) -> str | None:
        """What to say where the generation in use was trained on another base; `base`: the digest of that of now."""
        own = self.generations(name)
        if not own.result(own.current).base_differs(base):
            return None
        return f"{self.recipe.model.path} holds other weights than generation {own.current} was trained on"

    def other_recipe(self, name: str) -> str | None:
        """What to say where the recipe is another one by now, of a daughter that has nothing to learn and no pin."""
        own = self.generations(name)
        told = [] if own.pinned else recipe_differs(recipe_for(self.recipe, self.people, name), own)
        return "; ".join(told) or None

    def prepare(self, name: str) -> bool:
        """Whether a finished daughter has a next generation to be trained here, which is begun if need be. UserError,
        OSError.
        """
        own, first = self.generations(name), recipe_for(self.recipe, self.people, name)
        decide_newest(own)
        if own.pinned:
            return False
        offered = rows_of(first.data)
        latest = own.learnt(own.newest)
        unfinished = own.unfinished
        if latest is None and unfinished is None and not rows_differ(first):
            own.note(own.newest, of_the_first(offered, first.data.validation_split))  # of an earlier version
            return False
        if latest is not None and latest.offered == offered.digest:
            return unfinished is not None
        number = unfinished or own.newest + 1
        learnt = self._learns(own, offered, number, first)
        if learnt is None:
            return False
        own.begin(number, offered, learnt, own.current)
        return True

    def _learns(self, own: Generations, offered: Offered, number: int, first: Recipe) -> Learnt | None:
        """What a next generation learns; None where nothing is new. UserError where nothing could judge it."""
        before = [learnt for n in own.lineage(own.current) if (learnt := own.learnt(n)) is not None]
        learnt = of_the_next(
            offered, before, number, self.recipe.daughters.replay, first.data.validation_split
        )
        if learnt is not None and not learnt.valid and not first.evaluation.sets:
            raise UserError(
                f"{first.data.path}: nothing is held out to judge a new generation by; add a valid.jsonl, "
                "data.validation_split or evaluation.sets"
            )
        return learnt


def next_recipe(first: Recipe, own: Generations, number: int) -> Recipe:
    """The recipe of a later generation: its own rows, from the one that it began from."""
    place, start = own.place(number), own.place(own.begun_from(number) or 1) / FINAL
    return variant(
        first,
        {
            "data.path": place / ROWS,
            "data.validation_split": None,  # what is held out is among the rows
            "run.dir": place,
            "tuning.start": start,
        },
    )


def decide_newest(own: Generations) -> str:
    """Decide about the newest generation if it is complete and nothing is decided yet; what is to be said. OSError."""
    with own.alone():
        return _decide_newest(own)


def _decide_newest(own: Generations) -> str:
    number = own.newest
    if not (own.folder / CURRENT).is_symlink() and own.numbers[:1] == [1]:
        own.use(1)
    if number == 1 or number == own.unfinished or own.decision(number) is not None:
        return ""
    place, begun_from = own.place(number), own.begun_from(number) or 1
    evaluation = load_recipe(place / "recipe.yaml").evaluation
    found = judge(evaluation, read_metrics(place), number, begun_from)
    if found.promoted and own.pinned:
        found = replace(found, promoted=False, why=f"{found.why}; but it is pinned")
    elif found.promoted and own.current not in (begun_from, number):
        found = replace(
            found, promoted=False, why=f"{found.why}; but generation {own.current} was put into use"
        )
    own.decide(found)
    if found.promoted:
        return f"generation {number} is in use: {found.why}"
    return f"generation {number} is kept, generation {own.current} stays in use: {found.why}"
