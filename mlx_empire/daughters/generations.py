"""The generations of one daughter: which there are, where each lies, which is in use, and what was decided of each.

    alice/                 the first one, a folder as `daughters` leaves it
    alice/generations/2/   a run's folder for each later one, with its rows/ and, once that is decided, DECISION.json
    alice/current          a link to the final/ of the one in use
    alice/PINNED           made by --pin: the one in use stays, and nothing new is learnt

Each has rows.json: the hashes of what it learnt. A folder of a generation appears as a whole, the link is replaced at
once, and what is decided follows from what the generation left: a kill between any two of them is made good by doing
the next of them again. None that is complete is ever removed.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_empire import progress
from mlx_empire.daughters.rows import Learnt, Offered, as_lines
from mlx_empire.disk import create_private, replace_private, sync_file, sync_folder
from mlx_empire.errors import UserError
from mlx_empire.formats.seal import unseal
from mlx_empire.formats.staging import fresh_folder, remove
from mlx_empire.run.finished import Finished
from mlx_empire.run.launched import COMPLETE
from mlx_empire.run.names import CURRENT, FINAL

FOLDER, DECISION, PINNED = "generations", "DECISION.json", "PINNED"
NOTE, ROWS = "rows.json", "rows"


@dataclass(frozen=True)
class Decision:
    """What became of a generation: whether it replaced the one it began from, why, and the scores of both."""

    generation: int
    begun_from: int
    promoted: bool
    why: str
    scores: Mapping[str, tuple[float | None, float | None]]


@dataclass(frozen=True)
class Generations:
    """Those in a daughter's folder."""

    folder: Path

    def place(self, number: int) -> Path:
        """Where a generation lies."""
        return self.folder if number == 1 else self.folder / FOLDER / str(number)

    def result(self, number: int) -> Finished:
        """What came of a finished one."""
        return Finished(self.place(number) / FINAL, self.place(number))

    @property
    def numbers(self) -> list[int]:
        """All that are begun, in their order; the first one once it is finished."""
        later = self.folder / FOLDER
        names = [path.name for path in later.iterdir()] if later.is_dir() else []
        first = [1] if (self.folder / COMPLETE).exists() else []
        return first + sorted(int(name) for name in names if name.isdecimal())

    @property
    def newest(self) -> int:
        """The last that is begun."""
        return max(self.numbers, default=1)

    @property
    def finished(self) -> list[int]:
        """All that are complete."""
        return [number for number in self.numbers if (self.place(number) / COMPLETE).exists()]

    @property
    def unfinished(self) -> int | None:
        """The one that is begun and not complete; there is one at most, and it is the last."""
        last = self.newest
        return last if last > 1 and not (self.place(last) / COMPLETE).exists() else None

    @property
    def current(self) -> int:
        """The one in use: that of the link, without one the first."""
        with suppress(OSError, ValueError):
            parts = Path(os.readlink(self.folder / CURRENT)).parts
            return int(parts[1]) if parts[0] == FOLDER else 1
        return 1

    @property
    def pinned(self) -> bool:
        """Whether the one in use stays."""
        return (self.folder / PINNED).exists()

    def use(self, number: int) -> None:
        """Put a finished generation into use, at once. OSError."""
        where = FINAL if number == 1 else f"{FOLDER}/{number}/{FINAL}"
        draft = self.folder / f".{CURRENT}"
        draft.unlink(missing_ok=True)
        draft.symlink_to(where)
        os.replace(draft, self.folder / CURRENT)
        sync_folder(self.folder)

    def begun_from(self, number: int) -> int | None:
        """The generation from which one began; None for the first, or where nothing says it."""
        told = _read(self.place(number) / NOTE).get("begun_from")
        return told if isinstance(told, int) and 0 < told < number else None

    def lineage(self, number: int) -> list[int]:
        """A generation and those that it comes from, the latest first."""
        found = [number]
        while (before := self.begun_from(found[-1])) is not None:
            found.append(before)
        return found

    def learnt(self, number: int) -> Learnt | None:
        """What a generation learnt; None where it is not noted."""
        told = _read(self.place(number) / NOTE)
        with suppress(KeyError, TypeError):
            return Learnt(tuple(told["train"]), tuple(told["valid"]), str(told["offered"]))
        return None

    def note(self, number: int, learnt: Learnt, begun_from: int | None = None) -> None:
        """Keep what a generation learns. OSError."""
        _note(self.place(number), learnt, begun_from)

    def begin(self, number: int, offered: Offered, learnt: Learnt, begun_from: int) -> None:
        """Make the folder of a generation, with its rows, as a whole; one that is not complete gives way. OSError."""
        (self.folder / FOLDER).mkdir(mode=0o700, exist_ok=True)
        draft = self.folder / FOLDER / f".{number}.partial"
        fresh_folder(draft)
        (draft / ROWS).mkdir(mode=0o700)
        known = {**offered.train, **(offered.valid or {})}
        for name, hashes in (("train", learnt.train), ("valid", learnt.valid)):
            if hashes:
                with create_private(draft / ROWS / f"{name}.jsonl") as file:
                    file.write(as_lines(known, hashes).encode("utf-8", "surrogatepass"))
                    sync_file(file)
        _note(draft, learnt, begun_from)
        sync_folder(draft / ROWS)
        sync_folder(draft)
        progress.reach("prepare")
        unseal(self.place(number) / FINAL)
        remove(self.place(number))
        os.rename(draft, self.place(number))
        sync_folder(self.folder / FOLDER)

    def decision(self, number: int) -> Decision | None:
        """What became of a generation; None while nothing is decided."""
        told = _read(self.place(number) / DECISION)
        with suppress(TypeError, ValueError):
            return Decision(**told)
        return None

    def decide(self, decision: Decision) -> None:
        """Put a generation into use if it is promoted, and note what was decided. Repeatable. OSError."""
        progress.reach("decide")
        if decision.promoted:
            self.use(decision.generation)
        progress.reach("promote")
        self._note_decision(decision)

    def _note_decision(self, decision: Decision) -> None:
        text = json.dumps(asdict(decision), indent=1) + "\n"
        replace_private(self.place(decision.generation) / DECISION, text, durable=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within, no other command of this machine decides what is in use here: it waits. OSError."""
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # some shared disks know no locks
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def roll_back(self, to: int | None) -> int:
        """Put an earlier generation into use, by default the one from which that in use began; which. UserError.

        Where a kill came between the use of a generation and the note of why, that is decided by this: the next round
        must not put it into use again.
        """
        now = self.current
        target = self.begun_from(now) if to is None else to
        if target is None:
            raise UserError(
                f"--rollback: {self.folder.name}: generation 1 is in use, and there is none before it"
            )
        if target not in self.finished:
            raise UserError(
                f"--rollback: {self.folder.name}={target}: no such generation is finished; there are "
                f"{', '.join(map(str, self.finished)) or 'none'}"
            )
        if now not in (1, target) and self.decision(now) is None:
            why = f"generation {target} was put into use"
            self._note_decision(Decision(now, self.begun_from(now) or 1, False, why, {}))
        self.use(target)
        return target

    def pin(self, *, on: bool) -> None:
        """From now on the one in use stays, or no longer. OSError."""
        if on:
            replace_private(self.folder / PINNED, "\n", durable=True)
        else:
            (self.folder / PINNED).unlink(missing_ok=True)

    def lines(self) -> list[str]:
        """What there is, for a person: a line for each."""
        said = []
        for number in self.numbers:
            decision = self.decision(number)
            if number == self.unfinished:
                state = "not finished"
            elif decision is not None:
                state = f"{'promoted' if decision.promoted else 'refused'}: {decision.why}"
            else:
                state = "finished"
            mark = " (in use" + (", pinned)" if self.pinned else ")") if number == self.current else ""
            said.append(f"{self.folder.name}: generation {number}{mark}: {state}")
        return said


def _note(place: Path, learnt: Learnt, begun_from: int | None) -> None:
    told = {**asdict(learnt), **({} if begun_from is None else {"begun_from": begun_from})}
    replace_private(place / NOTE, json.dumps(told) + "\n", durable=True)


def _read(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        told = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(told, dict):
            return told
    return {}
