"""The table of faults for people, from what the last run of tests/faults left in build/faults.json.

`python tests/support/fault_table.py` prints it; with `--write FILE` it replaces what stands in that file between the
lines <!-- faults --> and <!-- /faults -->.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

# Each of pytest-xdist's processes leaves a file of its own.
EVENTS = (
    Path(__file__).resolve().parents[2] / "build" / f"faults{os.environ.get('PYTEST_XDIST_WORKER', '')}.json"
)
BEGIN, END = "<!-- faults -->", "<!-- /faults -->"
COLUMNS = {
    "fault": "fault",
    "injected": "how",
    "lost": "lost",
    "detected": "job ended after",
    "continued": "next step after",
}


def table(events: Sequence[Mapping[str, str]]) -> str:
    """Markdown; faults in the order of their names, the same fault once."""
    rows = {event["fault"]: event for event in sorted(events, key=lambda event: event["fault"])}
    lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS)]
    lines += [[row[name] for name in COLUMNS] for row in rows.values()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def placed(text: str, made: str) -> str:
    """`text` with the table between its marks; ValueError where they are missing."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{BEGIN} and {END} are missing")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main() -> None:
    """Print the table, or write it into a file."""
    parser = argparse.ArgumentParser(description="The table of faults, from build/faults.json.")
    parser.add_argument("--write", type=Path, help="a file with the marks")
    options = parser.parse_args()
    files = sorted(EVENTS.parent.glob("faults*.json"))  # tests/launch leaves faults-launch.json
    made = table([event for file in files for event in json.loads(file.read_text())])
    if options.write:
        options.write.write_text(placed(options.write.read_text(), made))
    else:
        print(made)


if __name__ == "__main__":
    main()
