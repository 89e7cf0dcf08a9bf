"""Continuous mode as a person meets it: when the people's rows are looked at again, and which generation is in use.

A round is the whole command once. Between rounds no process holds the base: nothing but the names, sizes and times of
the people's files is looked at, and a round begins when they are other than before and have come to rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from mlx_empire.daughters.generations import PINNED, Generations
from mlx_empire.daughters.source import JobSource
from mlx_empire.errors import UserError
from mlx_empire.formats.staging import disk_errors
from mlx_empire.recipe.schema import Recipe

Fingerprint = tuple[tuple[str, int, int], ...]


def refuse_unwatchable(recipe: Recipe) -> None:
    """UserError for what a recipe may not ask of continuous mode."""
    if recipe.run.resume == "never":
        raise UserError("run.resume: never: --watch goes on from what there is; use auto")
    if recipe.evaluation.fallback is not None:
        raise UserError(
            f"evaluation.fallback: {recipe.evaluation.fallback}: with --watch what was in use stays so where a new "
            "generation is not good enough; leave it out"
        )


def again_and_again(
    jobs: JobSource, one_round: Callable[[], int], every: float, good: Collection[int]
) -> int:
    """A round, and another whenever the people's files have changed; the code of the first that is not `good`."""
    while True:
        before = fingerprint(jobs)
        if (code := one_round()) not in good:
            return code
        print(f"watching {jobs.people}: new rows begin a new generation (Ctrl-C ends it)", flush=True)
        _until_changed(jobs, before, every)


def _until_changed(jobs: JobSource, before: Fingerprint, every: float) -> None:
    while True:
        now = fingerprint(jobs)
        time.sleep(every)
        if now != before and now == fingerprint(jobs):  # else nothing is new, or somebody still writes
            return


def fingerprint(jobs: JobSource) -> Fingerprint:
    """What is other where a person's files, or who is pinned, changed."""
    files = [path for path in jobs.people.rglob("*") if path.is_file()]
    files += list(jobs.recipe.run.dir.glob(f"*/{PINNED}"))
    found = []
    for path in sorted(files):
        try:
            about = path.stat()
        except OSError:
            continue  # gone since it was listed
        found.append((str(path), about.st_size, about.st_mtime_ns))
    return tuple(found)


def manage(jobs: JobSource, rollback: Sequence[str], pin: Sequence[str], unpin: Sequence[str]) -> int:
    """Put earlier generations into use, pin or unpin daughters, and say what there is of each. UserError."""
    for asked in rollback:
        name, _, number = asked.partition("=")
        if number and not number.isdecimal():
            raise UserError(f"--rollback: {asked}: expected NAME or NAME=N, such as alice=1")
        own = _known(jobs, name, "--rollback")
        with disk_errors(own.folder), own.alone():
            own.roll_back(int(number) if number else None)
    for option, names in (("--pin", pin), ("--unpin", unpin)):
        for name in names:
            own = _known(jobs, name, option)
            with disk_errors(own.folder), own.alone():
                own.pin(on=option == "--pin")
    touched = dict.fromkeys([*(asked.partition("=")[0] for asked in rollback), *pin, *unpin])
    print("\n".join(line for name in touched for line in jobs.generations(name).lines()))
    return 0


def _known(jobs: JobSource, name: str, option: str) -> Generations:
    folder: Path = jobs.recipe.run.dir / name
    if not name or Path(name).name != name or not jobs.generations(name).finished:
        raise UserError(f"{option}: {name}: no finished daughter is in {folder}; name one, such as alice")
    return jobs.generations(name)
