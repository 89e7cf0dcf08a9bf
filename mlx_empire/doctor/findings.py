"""What was found, row by row: a table for a person, and the same as JSON to send on.

A row that is not as it should be makes the whole answer no, and has the line that mends it; one that is as it should be
may have such a line too, where something could be better.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

FILE = "check.json"


@dataclass(frozen=True)
class FindingRow:
    """One row; `mend`: a line to type or to do, "" where there is nothing to mend."""

    what: str
    where: str
    found: str
    good: bool = True
    mend: str = ""

    @property
    def mark(self) -> str:
        """How it stands, in a word."""
        return "no" if not self.good else "note" if self.mend else "ok"


COLOURS = {"ok": "green", "note": "yellow", "no": "red"}


@dataclass
class Findings:
    """All rows in the order in which they were found."""

    rows: list[FindingRow] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether all is as it should be."""
        return all(row.good for row in self.rows)

    def add(self, what: str, where: str, found: str, good: bool = True, mend: str = "") -> None:
        """One row more."""
        self.rows.append(FindingRow(what, where, " ".join(found.split()), good, mend))

    def show(self, console: Console) -> None:
        """The table, with what mends each row under it."""
        table = Table("", "what", "where", "found", box=None)
        for row in self.rows:
            mark = f"[{COLOURS[row.mark]}]{row.mark}[/]"
            table.add_row(mark, row.what, escape(row.where), escape(row.found))
        console.print(table)
        mends = [row for row in self.rows if row.mend]
        for row in mends:
            head = escape(f"{row.what}, {row.where}: ")
            console.print(f"[{COLOURS[row.mark]}]{row.mark}[/] {head}{escape(row.mend)}", soft_wrap=True)

    def document(self) -> str:
        """All of it as JSON."""
        rows = [asdict(row) for row in self.rows]
        return json.dumps({"good": self.good, "found": rows}, indent=1) + "\n"

    def write(self, folder: Path) -> Path:
        """The file to send on. OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(self.document())
        return folder / FILE
