"""All scores of a model at one moment of a run but the held-out loss (`gate`): the metrics of every evaluation set.

Micro-batches are streamed like a step's and dealt to the ranks in order, so no score depends on the number of ranks.

Known answers are scored by one streamed forward pass, exact also for a model that no machine holds whole. An answer is
right where each of its tokens is the likeliest after the ones before it: that is what greedy generation would write.

Rank 0 reads the sets and sends them to the others; every rank gets the same scores, so all decide alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mlx_empire.comm.failure import together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.data.batches import MicroBatch, validation_micro_batches
from mlx_empire.data.encode import Document, load_tokenizer
from mlx_empire.data.rows import Dataset, build_table
from mlx_empire.engine.step import StreamedStep
from mlx_empire.engine.trainer import Trainer
from mlx_empire.evaluation.constrained import Grammar, generate_constrained
from mlx_empire.evaluation.generation import generate
from mlx_empire.evaluation.grounding import REFUSED, UNANSWERABLE, Grounds, graded
from mlx_empire.evaluation.questions import (
    CHOICE,
    Answer,
    Prompt,
    Questions,
    every_answer,
    fits_schema,
    held,
    is_json,
    load_questions,
    matches,
)
from mlx_empire.evaluation.scorer import Scorer, asked_text, load_scorers
from mlx_empire.recipe.schema import Recipe


def micro_batches(answers: Sequence[Answer], sequence_length: int, micro_size: int) -> list[MicroBatch]:
    """Answers as micro-batches, one row each; `rows_read` says which answer a row is."""
    documents = (Document("", np.array(a.tokens, np.int32), np.array(a.counted, np.uint8)) for a in answers)
    table, counts = build_table(documents, sequence_length, splittable=False, packing=False)
    assert table is not None
    assert counts.cut == counts.dropped == 0, "questions are checked when they are read"
    return list(validation_micro_batches(Dataset(table, sequence_length, False), micro_size))


def score_answers(
    step: StreamedStep, comm: Communicator, batches: Sequence[MicroBatch], per_rank: int
) -> np.ndarray:
    """(answers, 3) float64: sum of log-probabilities, likeliest tokens, counted tokens. The same on every rank.

    Collective. At most `per_rank` micro-batches pass a rank at once, so evaluation needs no more memory than a step.
    """
    group = comm.size * per_rank
    found = np.zeros((sum(len(b.rows_read) for b in batches), 3))
    for first in range(0, len(batches), group):
        start = first + comm.rank * per_rank
        own = step.scores(batches[start : min(start + per_rank, len(batches))])
        flat = np.concatenate([np.empty((0, 2)), *own]).astype(np.float64).reshape(-1)
        rows = np.concatenate([part.reshape(-1, 2) for part in comm.gather_arrays(flat)])
        read = batches[first : first + group]
        places = np.array([row for b in read for row in b.rows_read], np.int64)
        found[places, :2] = rows
        found[places, 2] = np.concatenate([b.mask.sum(axis=1) for b in read])
    return found


Decode = Callable[[Sequence[int]], str]


def to_json(sets: Sequence[Questions]) -> list[dict[str, Any]]:
    """Questions as JSON; `from_json` is the inverse."""
    return [asdict(one) for one in sets]


def from_json(raw: Sequence[Mapping[str, Any]]) -> list[Questions]:
    """Questions that another rank has read."""
    return [
        Questions(
            one["title"],
            tuple(one["metrics"]),
            one["max_tokens"],
            one["constrained"],
            [Answer(**a) for a in one["answers"]],
            [([Answer(**a) for a in alternatives], right) for alternatives, right in one["choices"]],
            [_prompt(p) for p in one["prompts"]],
        )
        for one in raw
    ]


def _prompt(raw: Mapping[str, Any]) -> Prompt:
    grounds = raw["grounds"]
    read = None if grounds is None else Grounds(tuple(grounds["sources"]), tuple(grounds["supports"]))
    return Prompt(**{**raw, "grounds": read})


@dataclass
class RowScore:
    """What came of one row: metric -> value, the number of the choice that was the likeliest, what was generated, and
    where answers from sources are graded whether it refuses, and should.
    """

    values: dict[str, float] = field(default_factory=dict)
    choice: int | None = None
    said: str | None = None
    refused: bool | None = None
    unanswerable: bool | None = None


@dataclass(frozen=True)
class AskedSets:
    """The sets, and the tokens that `ends` an answer; on rank 0 what makes text of tokens where answers are generated,
    the grammar where some are constrained, and the sets' own functions by title.
    """

    sets: Sequence[Questions]
    ends: Sequence[int] = ()
    decode: Decode | None = None
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    grammar: Grammar | None = None


def read_sets(recipe: Recipe, vocabulary: int) -> AskedSets:
    """All that rank 0 reads; what cannot be asked, or called, is refused before the first step. UserError."""
    folder, asked = recipe.model.path, recipe.evaluation
    sets: list[Questions] = []
    for one in asked.sets:
        free = load_questions(one, folder, recipe.data.sequence_length, vocabulary)
        sets += [free, *filter(None, [held(one, free)])]
    if not asked.generates:
        return AskedSets(sets)
    tokenizer = load_tokenizer(folder)
    ends = sorted(map(int, tokenizer.eos_token_ids))
    grammar = Grammar(tokenizer, vocabulary, ends) if any(one.constrained for one in sets) else None
    if grammar is not None:
        for text, where in _schemas(sets).items():
            grammar.refuse(json.loads(text), where)
    scorers = load_scorers(asked.sets)
    both = {title: scorers[one.title] for one in asked.sets if one.scorer for title in one.columns}
    return AskedSets(sets, ends, tokenizer.decode, both, grammar)


def _schemas(sets: Sequence[Questions]) -> dict[str, str]:
    """Each different schema of the constrained columns as JSON, and the row where it stands first."""
    found: dict[str, str] = {}
    for column in (column for column in sets if column.constrained):
        known: set[int] = set()  # of objects: a set's own schema is one for all its rows
        for number, prompt in enumerate(column.prompts, 1):
            if id(prompt.schema) not in known:
                known.add(id(prompt.schema))
                found.setdefault(json.dumps(prompt.schema), f"evaluation.sets: {column.title}: row {number}")
    return found


class Evaluator:
    """Scores the sets again and again."""

    def __init__(self, asked: AskedSets, sequence_length: int, micro_size: int) -> None:
        self._asked, self._sets = asked, asked.sets
        answers = list(every_answer(asked.sets))
        self._batches = micro_batches(answers, sequence_length, micro_size) if answers else []

    @property
    def sets(self) -> Sequence[Questions]:
        """What is asked."""
        return self._sets

    @property
    def scorer_digests(self) -> dict[str, str]:
        """SHA-256 of each scorer's file as it was run, by its path; on rank 0."""
        return {one.path: one.digest for one in self._asked.scorers.values()}

    def scores(self, trainer: Trainer, comm: Communicator, per_rank: int) -> dict[str, float]:
        """`set.metric` -> value, the same on every rank. Collective."""
        return self.measure(trainer, comm, per_rank)[0]

    def measure(
        self, trainer: Trainer, comm: Communicator, per_rank: int
    ) -> tuple[dict[str, float], dict[str, list[RowScore]]]:
        """`scores`, and by set what came of each of its rows; answers in words on rank 0 alone. Collective."""
        sums = score_answers(trainer.streamed, comm, self._batches, per_rank)
        said = self._said(trainer, comm)
        judged: dict[str, list[dict[str, float]]] | None = None
        with together(comm):
            if comm.rank == 0:
                judged = {one.title: self._judged(one, pairs) for one, pairs in said if pairs}
        texts: dict[str, list[dict[str, float]]] = comm.broadcast_json(judged)
        scores: dict[str, float] = {}
        rows: dict[str, list[RowScore]] = {}
        first = 0
        for one, pairs in said:
            answers, first = sums[first : first + len(one.answers)], first + len(one.answers)
            chosen, first = _chosen(one, sums, first)
            right = sum(hit for _, hit in chosen) / max(len(chosen), 1)
            values = texts.get(one.title, [])
            found = {**_of_answers(answers), CHOICE: right, **_means(values)}
            # What is graded by sources may have had no answer to look at.
            scores |= {f"{one.title}.{m}": found.get(m, 0.0) for m in one.metrics}
            rows[one.title] = _of_rows(one, answers, chosen, values)
            for row, (_, text) in zip(rows[one.title], pairs, strict=False):
                row.said = text
        return scores, rows

    def _judged(self, one: Questions, pairs: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
        """By generated answer of a set its metrics. On rank 0. UserError of a scorer."""
        found = [_of_text(prompt, text) for prompt, text in pairs]
        if (scorer := self._asked.scorers.get(one.title)) is not None:
            for values, (prompt, text) in zip(found, pairs, strict=True):
                values["scorer"] = scorer(asked_text(prompt.row), text, prompt.row)
        return found

    def _said(self, trainer: Trainer, comm: Communicator) -> list[tuple[Questions, list[tuple[Prompt, str]]]]:
        """Each set with its prompts and what was generated after them: nothing but on rank 0."""
        said = {held: self._written(trainer, comm, held=held) for held in (False, True)}
        return [(one, list(zip(one.prompts, said[one.constrained], strict=False))) for one in self._sets]

    def _written(self, trainer: Trainer, comm: Communicator, *, held: bool) -> Iterator[str]:
        """What is generated after all prompts of the sets, or of those that a grammar `held`; nothing but on rank 0."""
        asked = self._asked
        prompts = [(one, prompt) for one in self._sets if one.constrained == held for prompt in one.prompts]
        lengths = [one.max_tokens for one, _ in prompts]
        if not prompts:
            return iter(())
        if held:
            within = [(prompt.tokens, prompt.schema) for _, prompt in prompts]
            tokens = generate_constrained(trainer, comm, asked.grammar, within, lengths, asked.ends)
        else:
            tokens = generate(trainer, comm, [prompt.tokens for _, prompt in prompts], lengths, asked.ends)
        if comm.rank > 0:
            return iter(())
        assert asked.decode is not None
        return map(asked.decode, tokens)


def _of_answers(rows: np.ndarray) -> dict[str, float]:
    """Metrics of (answers, 3) sums: log-probability, likeliest tokens, counted tokens."""
    if not len(rows):
        return {}
    loss = -math.fsum(rows[:, 0]) / rows[:, 2].sum()
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "token_accuracy": float(rows[:, 1].sum() / rows[:, 2].sum()),
        "exact_match": float(np.mean(rows[:, 1] == rows[:, 2])),
    }


def _chosen(one: Questions, sums: np.ndarray, first: int) -> tuple[list[tuple[int, bool]], int]:
    """By question the choice that is the likeliest as a whole, and whether it is right; where the next rows begin."""
    found = []
    for alternatives, right in one.choices:
        choice = int(np.argmax(sums[first : first + len(alternatives), 0]))
        found.append((choice, choice == right))
        first += len(alternatives)
    return found, first


def _of_rows(
    one: Questions,
    answers: np.ndarray,
    chosen: Sequence[tuple[int, bool]],
    texts: Sequence[Mapping[str, float]],
) -> list[RowScore]:
    """What came of each row by itself: metric -> its loss per token, or 1 where it is right and 0 where it is not."""
    found = [RowScore() for _ in range(max(len(answers), len(chosen), len(texts)))]
    for row, sums in zip(found, answers, strict=False):
        row.values.update({m: v for m, v in _of_answers(sums[None]).items() if m in one.metrics})
    for row, (choice, hit) in zip(found, chosen, strict=False):
        row.values[CHOICE], row.choice = float(hit), choice
    for row, values in zip(found, texts, strict=False):
        row.values.update({m: v for m, v in values.items() if m in one.metrics})
        if REFUSED in values:
            row.refused, row.unanswerable = bool(values[REFUSED]), bool(values[UNANSWERABLE])
    return found


def _means(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metric -> its mean over the answers that have it."""
    found: dict[str, list[float]] = {}
    for one in values:
        for name, value in one.items():
            found.setdefault(name, []).append(value)
    return {name: math.fsum(several) / len(several) for name, several in found.items()}


def _of_text(prompt: Prompt, text: str) -> dict[str, float]:
    """Metrics of one generated answer, 1 where it is right and 0 where it is not."""
    found = {"valid_json": float(is_json(text))}
    if prompt.pattern is not None:
        found["regular_expression"] = float(matches(text, prompt.pattern))
    if prompt.schema is not None:
        found["json_schema"] = float(fits_schema(text, prompt.schema))
    if prompt.grounds is not None:
        found |= graded(prompt.grounds, text, prompt.refusal)
    return found
