"""What an evaluation found, as JSON: scores beside those of what it is compared with, and which rows changed.

A row has changed where a metric that is right or wrong is other than before. Of losses the rows that rose most are
told. Scores that got worse come first, the worst of them at the top: that is what a model forgot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from mlx_empire.evaluation.evaluator import RowScore
from mlx_empire.evaluation.questions import Answer, Questions
from mlx_empire.recipe.evaluation import LOWER_IS_BETTER, worse_by

MOST_ROWS = 200  # of one kind that are told of a set
MOST_RISEN = 10
LOST, GAINED, ROSE = "no longer right", "right now", "loss rose most"
SMOOTH = (*LOWER_IS_BETTER, "token_accuracy", "scorer")  # a row is not right or wrong by these

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Scored:
    """One model's scores by name, and by set its rows as `worded` makes them."""

    name: str
    scores: Mapping[str, float]
    rows: Mapping[str, Sequence[Mapping[str, Any]]]


def worded(asked: Questions, found: Sequence[RowScore], decode: Decode) -> list[dict[str, Any]]:
    """By row of a set: question, what was expected and said as texts (None: nothing of it), and values by metric."""
    made = []
    for number, row in enumerate(found):
        question, expected, said = None, None, row.said
        if asked.prompts:
            question = decode(asked.prompts[number].tokens)
        elif asked.choices:
            alternatives, right = asked.choices[number]
            question, expected = _divided(alternatives[right], decode)
            said = _divided(alternatives[row.choice or 0], decode)[1]
        if asked.answers:
            question, expected = _divided(asked.answers[number], decode)
        made.append({"question": question, "expected": expected, "said": said, "values": row.values})
    return made


def _divided(answer: Answer, decode: Decode) -> tuple[str, str]:
    """The text before the first token that counts, and the tokens that count."""
    first = int(np.argmax(answer.counted))
    counted = [token for token, counts in zip(answer.tokens, answer.counted, strict=True) if counts]
    return decode(answer.tokens[:first]), decode(counted)


def changed_document(found: Sequence[Scored]) -> dict[str, Any]:
    """The document. `found`: one model, or what it is compared with and then the model."""
    before, after = (None, found[0]) if len(found) == 1 else found
    scores = [
        {
            "name": name,
            "before": None if before is None else before.scores[name],
            "after": value,
            "worse": None if before is None else worse_by(name, before.scores[name], value),
        }
        for name, value in after.scores.items()
    ]
    sets = []
    if before is not None:
        sets = [
            {"name": name, "rows": len(rows), **_changed(before.rows[name], rows)}
            for name, rows in after.rows.items()
        ]
    made = {
        "model": after.name,
        "against": None if before is None else before.name,
        "scores": scores,
        "sets": sets,
        "rows": {name: list(rows) for name, rows in after.rows.items()},
    }
    return {**made, "told": sentences(made)}


def _changed(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts of rows that are no longer right and that are right now, and those rows."""
    kinds: dict[str, list[dict[str, Any]]] = {LOST: [], GAINED: [], ROSE: []}
    for number, (old, new) in enumerate(zip(before, after, strict=True), 1):
        about = {"row": number, "question": new["question"], "expected": new["expected"]}
        about |= {"before": old["said"], "after": new["said"]}
        changes = {m: (old["values"][m], v) for m, v in new["values"].items() if m not in SMOOTH}
        for kind, sign in ((LOST, -1), (GAINED, 1)):
            metrics = [m for m, (a, b) in changes.items() if (b - a) * sign > 0]
            if metrics:
                kinds[kind].append({**about, "kind": kind, "what": ", ".join(metrics)})
        if "loss" in new["values"]:
            a, b = old["values"]["loss"], new["values"]["loss"]
            if b > a:
                kinds[ROSE].append({**about, "kind": ROSE, "what": f"{a:.4f} to {b:.4f}", "by": b - a})
    kinds[ROSE].sort(key=lambda row: -row.pop("by"))
    shown = [
        row
        for kind, most in ((LOST, MOST_ROWS), (GAINED, MOST_ROWS), (ROSE, MOST_RISEN))
        for row in kinds[kind][:most]
    ]
    return {"lost": len(kinds[LOST]), "gained": len(kinds[GAINED]), "changed": shown}


def sentences(document: Mapping[str, Any]) -> list[str]:
    """What there is to say in sentences."""
    if document["against"] is None:
        return []
    worse = sorted((one for one in document["scores"] if one["worse"] > 0), key=lambda one: -one["worse"])
    lines = [
        f"worse than {document['against']}: {one['name']} {one['before']:.4f} to {one['after']:.4f}"
        for one in worse
    ] or [f"no score is worse than {document['against']}'s"]
    for one in document["sets"]:
        lines.append(f"{one['name']}: of {one['rows']} rows {one['lost']} {LOST}, {one['gained']} {GAINED}")
    return lines


def score_table(document: Mapping[str, Any]) -> Table:
    """The scores for a terminal. Names are a person's, and no markup."""
    both = document["against"] is not None
    made = Table(title=Text(document["model"], "table.title"), title_justify="left")
    made.add_column("score")
    if both:
        made.add_column(Text(str(document["against"])), justify="right", overflow="fold")
    made.add_column("result", justify="right")
    if both:
        made.add_column("change", justify="right")
    for one in document["scores"]:
        cells: list[str | Text] = [Text(one["name"]), f"{one['after']:.4f}"]
        if both:
            cells[1:] = [
                f"{one['before']:.4f}",
                f"{one['after']:.4f}",
                f"{one['after'] - one['before']:+.4f}",
            ]
        made.add_row(*cells)
    return made
