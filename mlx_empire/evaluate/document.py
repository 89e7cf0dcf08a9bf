"""What an evaluation found, as JSON: scores beside those of what it is compared with, and which rows changed.

A row has changed where a metric that is right or wrong is other than before. Of losses the rows that rose most are
told. Scores that got worse come first, the worst of them at the top: that is what a model forgot.

Told of each set besides: its failures, which are rows that a metric which is right or wrong calls wrong, and where
answers from sources are graded the confusion table. The constrained column of a set counts as a set of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from mlx_empire.evaluation.evaluator import RowScore
from mlx_empire.evaluation.questions import Answer, Questions
from mlx_empire.recipe.evaluation import CONSTRAINED, LOWER_IS_BETTER, worse_by

MOST_ROWS = 200  # of one kind that are told of a set
MOST_RISEN = 10
LOST, GAINED, ROSE = "no longer right", "right now", "loss rose most"
SMOOTH = ("loss", "perplexity", "token_accuracy", "scorer")  # a row is not right or wrong by these
ANSWERED, REFUSED = "answered", "refused"
CASES = {
    False: "has an answer in its sources",
    True: "has none",
}  # of a question, by whether it is unanswerable

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
        about = {"question": question, "expected": expected, "said": said, "values": row.values}
        graded = {"refused": row.refused, "unanswerable": row.unanswerable}
        made.append(about | (graded if row.refused is not None else {}))
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
        "graded": [
            {"name": name, "rows": len(rows), "confusion": confusion(rows), **_failures(rows)}
            for name, rows in after.rows.items()
        ],
        "rows": {name: list(rows) for name, rows in after.rows.items()},
    }
    return {**made, "told": sentences(made)}


def right(metric: str, value: float) -> bool:
    """Whether a row is right by a metric, of which all or nothing counts."""
    return value <= 0 if metric in LOWER_IS_BETTER else value >= 1


def confusion(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where answers from sources are graded: how many questions with and without an answer were answered and refused,
    and whether that is right; else nothing.
    """
    counts = {(case, refused): 0 for case in CASES for refused in (False, True)}
    graded = [row for row in rows if "refused" in row]
    for row in graded:
        counts[row["unanswerable"], row["refused"]] += 1
    return [
        {"case": CASES[case], "did": REFUSED if refused else ANSWERED, "rows": n, "right": case == refused}
        for (case, refused), n in counts.items()
        if graded
    ]


def _failures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many rows some metric calls wrong, and the first of them with those metrics."""
    found = []
    for number, row in enumerate(rows, 1):
        wrong = [m for m, v in row["values"].items() if m not in SMOOTH and not right(m, v)]
        if wrong:
            about = {key: row[key] for key in ("question", "expected", "said")}
            found.append({"row": number, **about, "what": ", ".join(wrong)})
    return {"failed": len(found), "failures": found[:MOST_ROWS]}


def _changed(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts of rows that are no longer right and that are right now, and those rows."""
    kinds: dict[str, list[dict[str, Any]]] = {LOST: [], GAINED: [], ROSE: []}
    for number, (old, new) in enumerate(zip(before, after, strict=True), 1):
        about = {"row": number, "question": new["question"], "expected": new["expected"]}
        about |= {"before": old["said"], "after": new["said"]}
        shared = [m for m in new["values"] if m in old["values"] and m not in SMOOTH]
        changes = {m: (right(m, old["values"][m]), right(m, new["values"][m])) for m in shared}
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


def columns(scores: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Mapping[str, Any] | None]]:
    """Each score with the same metric's where a grammar held the answers, None where it has none."""
    held = {one["name"]: one for one in scores if f".{CONSTRAINED}." in one["name"]}
    return [
        (one, held.get(f".{CONSTRAINED}.".join(one["name"].split("."))))
        for one in scores
        if one["name"] not in held
    ]


def score_table(document: Mapping[str, Any]) -> Table:
    """The scores for a terminal, constrained ones in a second column. Names are a person's, and no markup."""
    both = document["against"] is not None
    pairs = columns(document["scores"])
    made = Table(title=Text(document["model"], "table.title"), title_justify="left")
    made.add_column("score")
    for kind in ("", f", {CONSTRAINED}") if any(held for _, held in pairs) else ("",):
        if both:
            made.add_column(Text(f"{document['against']}{kind}"), justify="right", overflow="fold")
        made.add_column(f"result{kind}", justify="right")
        if both:
            made.add_column("change", justify="right")
    for free, held in pairs:
        made.add_row(Text(free["name"]), *_cells(free, both), *(_cells(held, both) if held else ()))
    return made


def _cells(one: Mapping[str, Any], both: bool) -> list[str]:
    now = f"{one['after']:.4f}"
    return [f"{one['before']:.4f}", now, f"{one['after'] - one['before']:+.4f}"] if both else [now]
