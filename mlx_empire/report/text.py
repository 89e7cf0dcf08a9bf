"""Decides how numbers look to a person: durations, counts, and bars of a fixed width (bytes: `sizes`).

And whether a person watches the output live, and how large that terminal is. `isatty` cannot tell under mpirun: Open
MPI gives every rank a pseudo-terminal of its own as standard output, also where mpirun itself writes to a file, and
copies what arrives there. What counts is where the launcher's standard output goes: the launcher is the parent of a
rank on the machine where it was typed, and elsewhere a daemon that writes to nothing.
"""

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO


def terminal_size(stream: TextIO) -> os.terminal_size | None:
    """Columns and lines of the terminal where `stream` ends up; None for a file, a pipe, a dumb terminal."""
    if os.environ.get("TERM", "dumb") == "dumb":
        return None
    try:
        own = stream.fileno()
        if not os.isatty(own):
            return None
        if "PMIX_RANK" not in os.environ:  # set by Open MPI's launcher for each rank
            return _size(own)
        with _launchers_output(os.getppid()) as launchers:
            # A shell between the launcher and this process shares our own pseudo-terminal and tells nothing.
            shared = os.path.samestat(os.fstat(launchers), os.fstat(own))
            return None if shared or not os.isatty(launchers) else _size(launchers)
    except (OSError, ValueError):  # no descriptor, no such file, no lsof: nobody is known to watch
        return None


def _size(descriptor: int) -> os.terminal_size:
    size = os.get_terminal_size(descriptor)
    return size if size.columns and size.lines else os.terminal_size((80, 24))


@contextmanager
def _launchers_output(process: int) -> Iterator[int]:
    """A descriptor of what `process` has as standard output, opened for reading only."""
    descriptor = os.open(_output_path(process), os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _output_path(process: int) -> str:
    """The name of a process's standard output: in /proc on Linux, from lsof on macOS."""
    if sys.platform == "linux":
        return f"/proc/{process}/fd/1"
    command = ["lsof", "-a", "-p", str(process), "-d", "1", "-F", "n"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except subprocess.TimeoutExpired as error:
        raise OSError("lsof does not answer") from error
    names = [line[1:] for line in answer.splitlines() if line.startswith("n/")]
    if not names:
        raise OSError(f"lsof does not know the output of process {process}")
    return names[0]


# Where a bar of memory changes colour: (up to this part of the limit, colour).
LEVELS = ((0.80, "green"), (0.95, "yellow"), (math.inf, "red"))


@dataclass(frozen=True)
class NodeRow:
    """One rank's line in the display; rows are indexed by rank.

    `share` is the part of the model it holds (0 to 1); both byte counts are of this rank alone.
    """

    name: str
    role: str
    share: float
    predicted_peak_bytes: int
    limit_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the plan's peak stays under the limit."""
        return self.predicted_peak_bytes <= self.limit_bytes


def duration(seconds: float) -> str:
    """Seconds as 45 s, 3 min 20 s, 5 h 07 min or 12 d 3 h; '?' where it is not known."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def number(value: float | None, form: str) -> str:
    """A figure of a record by a format specification; 'nan' for what is missing or not finite."""
    return format(value, form) if value is not None and math.isfinite(value) else "nan"


def fraction(part: float, whole: float) -> float:
    """part / whole; infinite where nothing is allowed, so that it shows as too much."""
    return part / whole if whole > 0 else math.inf


def level(part: float) -> str:
    """The colour of a fraction of a limit."""
    return next(colour for bound, colour in LEVELS if part < bound or bound == math.inf)


def bar(part: float, width: int, blocks: Sequence[str]) -> str:
    """A bar of `width` characters; `blocks` are the characters for a full and an empty cell."""
    full = round(width * min(max(part, 0.0), 1.0))
    return blocks[0] * full + blocks[1] * (width - full)


def span(pair: Sequence[float], unit: str = "") -> str:
    """A low and a high figure as '4.1 to 9.8 s'; one figure where both look the same, '?' for what is not finite."""
    low, high = (_three_digits(value) for value in (min(pair), max(pair)))
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"


def run_length(hours: Sequence[float]) -> str:
    """A span of hours, in seconds, minutes or days where that reads better."""
    longest = max(hours)
    units = ((1 / 30, 3600.0, " s"), (2.0, 60.0, " min"), (48.0, 1.0, " h"), (math.inf, 1 / 24, " days"))
    factor, unit = next((factor, unit) for bound, factor, unit in units if longest <= bound)
    return span([value * factor for value in hours], unit)


def energy(kilowatt_hours: Sequence[float]) -> str:
    """A span of energy, in watt-hours where that is little."""
    if max(kilowatt_hours) < 1:
        return span([1000 * value for value in kilowatt_hours], " Wh")
    return span(kilowatt_hours, " kWh")


def _three_digits(value: float) -> str:
    """A figure with three digits that matter, thousands set apart."""
    if not math.isfinite(value):
        return "?"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def times_signs(text: str) -> str:
    """A sentence of figures as a page shows it: the sign of multiplication where a terminal has an `x`."""
    return re.sub(r"(?<=[\w)%]) x (?=[\w(])", " × ", text)


def room(headroom: float) -> str:
    """Headroom as a fraction of the limit, in words."""
    return f"{headroom:.0%} free" if headroom >= 0 else f"{-headroom:.0%} over"


def billions(parameters: int) -> str:
    """Parameters with three digits that matter, in billions."""
    value = parameters / 1e9
    return f"{value:.2f} B" if value < 10 else f"{value:.1f} B" if value < 100 else f"{value:.0f} B"
