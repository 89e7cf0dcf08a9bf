"""What `inspect` found, on the terminal: figures, rows as tokens in colour, lengths, and what is worth a look.

Where nobody sees colours, signs stand around what is learnt and what is cut.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlx_empire.inspect.tokens import visible
from mlx_empire.recipe.text import one_line
from mlx_empire.report.text import bar

WIDTH = 110
PLACES = 8  # of a finding are printed; JSON and the page have more
BAR = 40
LEVELS = {"refused": ("bold red", "✗"), "leak": ("bold red", "✗"), "look": ("yellow", "!")}
MEND = {
    64: "mend or remove the rows that a run refuses, and inspect the data again",
    65: "take the rows that are in both out of one of the two, and inspect the data again",
}
STYLES = {"read": "grey50", "learnt": "black on green", "cut": "red strike"}
SIGNS = {"read": ("", ""), "learnt": ("⟦", "⟧"), "cut": ("⟨cut ", "⟩")}


def print_inspection(document: Mapping[str, Any], rows: int) -> None:
    """Print it all but what comes next; `rows`: how many rows are shown as tokens."""
    console = _console()
    for line in (*_head(document), *_rows(document, rows, console.color_system is not None)):
        console.print(line)
    console.print(_lengths(document["lengths"], "tokens" if document["tokenized"] else "characters"))
    for line in (*_about_all(document), *_findings(document["findings"]), *_told(document)):
        console.print(line)


def print_next(document: Mapping[str, Any]) -> None:
    """Print the next command, or what is to be mended before."""
    _console().print(Text(f"\nnext:\n  {document['next'] or MEND[document['exit_code']]}"))


def _console() -> Console:
    whole = sys.stdout.isatty()
    return Console(width=None if whole else WIDTH, highlight=False, soft_wrap=not whole)


def _head(document: Mapping[str, Any]) -> Iterator[Text]:
    kind = document["format"]
    yield Text(f"{one_line(document['data'])}: rows of format {kind}", "bold")
    for part in document["parts"]:
        text = f"{part['name']}: {part['rows']:,} rows, {part['characters']:,} characters"
        if document["tokenized"]:
            share = f" ({part['learnt_share']:.0%})" if part["learnt_share"] is not None else ""
            text = (
                f"{part['name']}: {part['rows']:,} rows, {part['tokens']:,} tokens, {part['learnt']:,} of them learnt"
                f"{share}; in training {part['trained_rows']:,} rows of up to {document['sequence_length']:,} positions"
            )
        yield Text(text)
    if document["steps_per_epoch"]:
        yield Text(
            f"an epoch is {document['steps_per_epoch']:,.1f} steps of {document['rows_per_step']:,} rows",
            "dim",
        )
    if not document["tokenized"]:
        yield Text("no tokens: --model FOLDER shows what a model will read, and what of it is learnt", "dim")


def _rows(document: Mapping[str, Any], rows: int, coloured: bool) -> Iterator[Text]:
    every = [row for row in document["shown"] if row["part"] == "train"]
    shown = every[:: max(1, len(every) // rows)][:rows]  # a page has more of them
    for row in shown:
        if row["tokens"]:
            cut = f", {row['cut']:,} cut off" if row["cut"] else ""
            dropped = "" if row["learnt"] else ": dropped"
            says = f"{row['count']:,} tokens, {row['learnt']:,} learnt{cut}{dropped}"
        else:
            says = ""
        yield Text(f"\n{one_line(row['where'])}  {says}", "dim")
        yield _tokens(row, coloured)
    if shown:
        key = "grey: read   on green: learnt   struck out: cut off" if coloured else "⟦learnt⟧ ⟨cut off⟩"
        what = f"{key}; " if document["tokenized"] else ""
        count = document["parts"][0]["rows"]
        yield Text(
            f"\n{what}{len(shown)} of {count:,} training rows, a fair sample: --rows N shows more\n", "dim"
        )


def _tokens(row: Mapping[str, Any], coloured: bool) -> Text:
    """A row's tokens; every other one is underlined, so that their seams show."""
    if not row["tokens"]:
        return Text("\n".join(map(one_line, row["text"].split("\n"))))
    made, last = Text(), "read"
    for number, (token, state) in enumerate(row["tokens"]):
        if coloured:
            made.append(visible(token), STYLES[state] + (" underline" if number % 2 else ""))
            continue
        if state != last:
            made.append(SIGNS[last][1] + SIGNS[state][0])
            last = state
        made.append(visible(token))
    made.append("" if coloured else SIGNS[last][1])
    more = row["count"] - len(row["tokens"])
    made.append(f" … {more:,} more tokens" if more else "", "dim")
    return made


def _lengths(lengths: Sequence[Mapping[str, Any]], unit: str) -> Table:
    made = Table(box=None, header_style="dim", pad_edge=False)
    made.add_column(unit, justify="right")
    made.add_column("rows", justify="right")
    made.add_column("")
    most = max((one["rows"] for one in lengths), default=1)
    for one in lengths:
        span = f"{one['from']:,} to {one['to'] - 1:,}" if one["to"] else f"{one['from']:,} and more"
        part = max(one["rows"] / most, 1 / BAR)
        made.add_row(
            span, f"{one['rows']:,}", Text(bar(part, BAR, "█ ").rstrip(), "red" if one["over"] else "cyan")
        )
    return made


def _about_all(document: Mapping[str, Any]) -> Iterator[Text]:
    begins, answers = document["begins_with"], document["variety"]
    if begins["text"]:
        yield Text(f"\nevery row begins with {begins['tokens']:,} tokens: {begins['text'][:300]!r}")
        if begins["template"]:
            yield Text(f"of that the chat template writes {begins['template'][:300]!r}")
    if document["not_read"]:
        keys = ", ".join(
            f"{one_line(key)} ({count:,})" for key, count in [*document["not_read"].items()][:12]
        )
        yield Text(f"keys that training does not read, with the rows that have them: {keys}")
    if answers:
        distinct = ", ".join(f"distinct-{n} {value:.2f}" for n, value in answers["distinct"].items())
        yield Text(
            f"answers (of {answers['answers']:,} rows): compress {answers['compression']:.1f} times; {distinct}; "
            f"{answers['commonest']:.1%} are the commonest one"
        )
    if document["loss"] and document["loss"]["rows"]:
        loss = document["loss"]
        yield Text(
            f"before training: loss {loss['mean']:.3f} over {loss['tokens']:,} learnt tokens of {loss['rows']:,} rows; "
            f"{loss['likeliest']:.0%} of them are the likeliest"
        )
        for name in ("least", "greatest"):
            for place in loss[name]:
                yield Text(f"  {name} loss  {one_line(place['where'])}  {place['says']}", "dim")


def _findings(findings: Sequence[Mapping[str, Any]]) -> Iterator[Text]:
    yield Text(
        "" if findings else "\nnothing to look at: no row is refused, leaks, repeats or is dropped", "green"
    )
    for one in findings:
        style, sign = LEVELS[one["level"]]
        yield Text(f"{sign} {one_line(one['sentence'])}", style)
        for place in one["places"][:PLACES]:
            yield Text(f"    {one_line(place['where'])}: {one_line(place['says'])}")
        more = one["count"] - min(len(one["places"]), PLACES)
        if one["places"] and more > 0:
            yield Text(f"    … {more:,} more: --json has up to 1,000 of them", "dim")


def _told(document: Mapping[str, Any]) -> Iterator[Text]:
    for line in document["told"]:
        yield Text(one_line(line), "yellow")
