"""What a model makes of rows before it is trained on them: one streamed forward pass, as evaluations of a run make it.

So a model that no machine holds whole is asked over as many machines as train it: the plan is the run's own, but the
optimizer's states are not made. Decides which rows the model already *knows* (it would write every learnt token
itself, each the likeliest after the ones before) and which look *incoherent* to it (the loss is far above the others').
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_empire import progress
from mlx_empire.comm.failure import together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.evaluation.evaluator import micro_batches, score_answers
from mlx_empire.evaluation.questions import Answer
from mlx_empire.inspect.findings import MOST_PLACES, DataFinding, RowPlace
from mlx_empire.inspect.walk import SeenRow
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.wired_limit import fitting_plan
from mlx_empire.recipe.schema import Recipe
from mlx_empire.run.agree import agree_on_model, share_config, share_nodes, share_target
from mlx_empire.run.proof import share_proof
from mlx_empire.run.trainer import explaining_memory, limit_memory, load_weights, make_trainer

DEVIATIONS = (
    3.0  # a row stands out so many standard deviations above the median (by the median deviation) ...
)
LEAST_ABOVE = 1.0  # ... and at least so much, in nats a token
ENOUGH_ROWS = 20  # to say what is ordinary
SIGMA = 1.4826  # standard deviations in a median absolute deviation, of a normal distribution
EXTREMES = 5  # rows with the least and the greatest loss that are named


@dataclass(frozen=True, eq=False)
class Losses:
    """Of each row: its place, its loss per learnt token, its learnt tokens, and how many of those are likeliest."""

    wheres: Sequence[str]
    loss: np.ndarray
    learnt: np.ndarray
    likeliest: np.ndarray

    @property
    def mean(self) -> float:
        """Of all tokens."""
        return float((self.loss * self.learnt).sum() / self.learnt.sum())

    @property
    def order(self) -> list[int]:
        """Rows by their loss, the least first."""
        order: list[int] = np.argsort(self.loss, kind="stable").tolist()
        return order

    @property
    def bound(self) -> float | None:
        """Above it a row stands out; None where rows are too few."""
        if len(self.loss) < ENOUGH_ROWS:
            return None
        median = float(np.median(self.loss))
        spread = SIGMA * float(np.median(np.abs(self.loss - median)))
        return median + max(DEVIATIONS * spread, LEAST_ABOVE)


def answer_of(row: SeenRow, sequence_length: int) -> Answer:
    """A row as evaluations score it: its first tokens, as many as a row of the run has."""
    end = min(row.kept, sequence_length + 1)
    return Answer(row.tokens[:end].tolist(), row.learnt[:end].astype(int).tolist())


def losses(
    comm: Communicator,
    recipe: Recipe,
    hosts: Path | None,
    rows: Sequence[SeenRow] | None,
    tell: Callable[[int], None],
) -> Losses | None:
    """The losses of `rows`, which rank 0 has; None on the other ranks. Collective.

    Errors: as a run's, where the model is not there, cannot be streamed or does not fit.
    """
    length = recipe.data.sequence_length
    own = None if rows is None else [asdict(answer_of(row, length)) for row in rows]
    answers = [Answer(**one) for one in comm.broadcast_json(own)]
    nodes = share_nodes(comm, recipe, hosts)
    agree_on_model(comm, recipe)
    config = share_config(comm, recipe)
    say = partial(print, file=sys.stderr)  # standard output has the findings alone
    target = share_proof(comm, recipe, config, share_target(comm, recipe, config), say=say)
    with together(comm):
        plan = fitting_plan(recipe, target.spec, nodes, state_bytes_of(recipe.optimizer))
        limit_memory(plan, comm.rank, recipe.memory.wired, nodes[comm.rank])
    progress.reach("load")
    with explaining_memory(plan, comm.rank), CommThread() as thread:
        trainer = make_trainer(comm, thread, recipe, target, plan)
        load_weights(comm, recipe, target, trainer.store)
        trainer.prepare(packing=False, fresh=False)
        progress.reach("evaluate")
        most = max(1, *(plan.work.micro_batches(r) for r in range(comm.size)))
        micro = recipe.batch.micro_size
        group, found = comm.size * most * micro, [np.zeros((0, 3))]
        for first in range(0, len(answers), group):
            batches = micro_batches(answers[first : first + group], length, micro)
            found.append(score_answers(trainer.streamed, comm, batches, most))
            tell(min(first + group, len(answers)))
    scores = np.concatenate(found)
    if rows is None:
        return None
    counted = scores[:, 2].astype(np.int64)
    return Losses(
        [row.where for row in rows], -scores[:, 0] / counted, counted, scores[:, 1].astype(np.int64)
    )


def loss_findings(found: Losses) -> list[DataFinding]:
    """Rows that the model knows, and rows that stand out."""
    told = []
    known = np.flatnonzero(found.likeliest == found.learnt)
    if len(known):
        sentence = f"{len(known):,} of {len(found.loss):,} rows that the model knows: it would write each learnt token"
        places = tuple(_place(found, p) for p in known[:MOST_PLACES].tolist())
        told.append(DataFinding("known", "look", len(known), sentence, places))
    bound = found.bound
    strange = np.flatnonzero(found.loss > bound) if bound is not None else np.empty(0, np.int64)
    if len(strange):
        sentence = (
            f"{len(strange):,} of {len(found.loss):,} rows that look incoherent to the model: their loss is above "
            f"{bound:.2f}, where the median is {np.median(found.loss):.2f}"
        )
        worst = sorted(strange.tolist(), key=lambda p: -found.loss[p])
        told.append(
            DataFinding(
                "incoherent",
                "look",
                len(strange),
                sentence,
                tuple(_place(found, p) for p in worst[:MOST_PLACES]),
            )
        )
    return told


def loss_document(found: Losses) -> dict[str, Any]:
    """The losses as JSON; per learnt token, in nats."""
    quantiles = np.quantile(found.loss, (0.05, 0.5, 0.95)).tolist() if len(found.loss) else [None] * 3
    order = found.order
    return {
        "rows": len(found.loss),
        "tokens": int(found.learnt.sum()),
        "mean": found.mean if len(found.loss) else None,
        "quantiles": dict(zip(("5%", "50%", "95%"), quantiles, strict=True)),
        "likeliest": float(found.likeliest.sum() / found.learnt.sum()) if len(found.loss) else None,
        "least": [vars(_place(found, p)) for p in order[:EXTREMES]],
        "greatest": [vars(_place(found, p)) for p in order[::-1][:EXTREMES]],
    }


def _place(found: Losses, row: int) -> RowPlace:
    return RowPlace(
        found.wheres[row],
        f"loss {found.loss[row]:.2f}, {found.likeliest[row]} of {found.learnt[row]} tokens likeliest",
    )
