"""How claims are told: as a table in a terminal, as JSON, and as the page docs/claims.md."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mlx_empire.claims.judge import TO_MEASURE, Judged, Value, claims, judged
from mlx_empire.comm.failure import guard
from mlx_empire.errors import UserError
from mlx_empire.plan.pace import spell

DOCUMENTS = {
    "S0": "the capability matrix",
    "S1": "a federation in full precision",
    "S2": "LoRA or QLoRA",
    "S3": "training on synthetic data",
    "S4": "training with 1.58 bits",
}
PLAIN_WIDTH = 160  # of a table that no terminal shows


def claims_command(options: argparse.Namespace) -> int:
    """What the command line asks for; returns the exit code."""
    with guard(None):
        found = answered(options.word)
        if options.json:
            print(json.dumps([document(one) for one in found], indent=1))
        elif options.markdown:
            print("\n".join(markdown(found)))
        else:
            width = None if sys.stdout.isatty() else PLAIN_WIDTH
            Console(width=width).print(table(found))
    return 0


def answered(word: str = "") -> list[Judged]:
    """Every claim that the word is in, beside our answer. UserError where it is in none."""
    wanted = [
        claim
        for claim in claims()
        if word.lower() in f"{claim.document} {claim.place} {claim.what} {claim.why}".lower()
    ]
    if not wanted:
        raise UserError(
            f"{word}: is in no claim; name a document, {' or '.join(DOCUMENTS)}, or a word such as LoRA"
        )
    from mlx_empire.claims.questions import QUESTIONS  # the plan, which a typo does not wait for

    return [judged(claim, QUESTIONS) for claim in wanted]


def document(one: Judged) -> dict[str, object]:
    """A claim beside ours as JSON."""
    return {**asdict(one.claim), "ours": one.ours.value, "formula": one.ours.formula, "verdict": one.verdict}


def table(found: Sequence[Judged]) -> Table:
    """For a terminal."""
    made = Table(
        box=None,
        header_style="dim",
        padding=(0, 2, 0, 0),
        title=verdicts_counted(found),
        title_justify="left",
    )
    for name in ("where", "of what", "they say", "we compute", "verdict", "how"):
        made.add_column(name, overflow="fold")
    for one in found:
        where = f"{one.claim.document}, {one.claim.place}"
        cells = (
            where,
            one.claim.what,
            said(one.claim.theirs, one),
            said(one.ours.value, one),
            one.verdict,
            explained(one),
        )
        made.add_row(*map(escape, cells))
    return made


def markdown(found: Sequence[Judged]) -> Iterator[str]:
    """The page, line by line."""
    yield "# What the documents say, and what is computed here"
    yield ""
    yield "Part of [the README](../README.md). `make claims` writes it; `mlx-empire claims S2` tells a part."
    yield ""
    yield (
        f"The owner's documents were written before there was a program to ask. {first_decision(found)}"
        "Here are the numbers on which a decision hangs, with the formula where another one follows. Ours are computed "
        "by the plan that training goes by (`mlx_empire/plan/`), on the machines of `hosts/`, for chips as "
        "`plan/chips.toml` knows them. GB are 10^9 bytes. *Agrees*: within 15 %, or the ranges meet; *near*: within "
        "35 %; `x`: ours is so many times theirs."
    )
    yield ""
    yield f"{verdicts_counted(found)}."
    for name, title in DOCUMENTS.items():
        rows = [one for one in found if one.claim.document == name]
        if not rows:
            continue
        yield ""
        yield f"## {name}: {title}"
        yield ""
        yield "| place | of what | they say | we compute | verdict | how |"
        yield "|---|---|---|---|---|---|"
        for one in rows:
            cells = (one.claim.place, one.claim.what, said(one.claim.theirs, one), said(one.ours.value, one))
            yield f"| {' | '.join((*cells, one.verdict, explained(one)))} |"


def first_decision(found: Sequence[Judged]) -> str:
    """Whether Scout is trained whole on the empire, as a sentence; nothing where that claim was not asked for."""
    one = next((one for one in found if one.claim.ask == "fit_verdict" and not one.claim.settings), None)
    if one is None:
        return ""
    held = {"yes": "holds", "tight": "holds, tightly"}.get(str(one.ours.value), "does not hold")
    return f"Their first decision, that {one.claim.what}, {held}. "


def verdicts_counted(found: Sequence[Judged]) -> str:
    """`62 claims: 20 agree, 10 are near, 30 differ, 2 are to be measured`."""
    words = Counter(one.verdict.partition(":")[0] for one in found)
    names = {"agrees": "agree", "near": "are near", "differs": "differ", TO_MEASURE: f"are {TO_MEASURE}"}
    return f"{len(found)} claims: " + ", ".join(
        f"{words[key]} {name}" for key, name in names.items() if words[key]
    )


def said(value: Value, one: Judged) -> str:
    """A value with its unit."""
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return f"{spell(value)} {one.claim.unit}"
    return f"{value:,.0f} {one.claim.unit}" if value >= 1000 else f"{value:.4g} {one.claim.unit}"


def explained(one: Judged) -> str:
    """The formula with its figures, and the sentence."""
    return f"{one.ours.formula}. {one.claim.why}".strip()
