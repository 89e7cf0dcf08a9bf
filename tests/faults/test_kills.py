"""K1: a rank killed at any phase costs at most the work since the last committed checkpoint; the rest is bitwise equal.

The links of a chain are launches of one and the same run, which begins with the checkpoint of step 3: every launch but
the last has a rank killed at another place, before step 6 is committed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
from support.faults import STEPS, Event, Lab, Outcome, Result, succeeded

FIRST, LAST = 0, 1


@dataclass(frozen=True)
class Link:
    """One launch with a rank killed in a phase; save phases strike at the first save, others at step 5."""

    phase: str
    rank: int

    @property
    def fault(self) -> str:
        step = "" if self.phase.startswith(("save", "retention", "load", "finish")) else "step=5;"
        return f"rank={self.rank};{step}phase={self.phase};action=kill"

    def __str__(self) -> str:
        return f"{self.phase} on {'first' if self.rank == FIRST else 'last'} rank"


ALWAYS = [
    Link(p, r) for p in ("save-write", "save-rename", "save-commit", "reduce-middle") for r in (FIRST, LAST)
]
PHASES = (
    "load",
    "data",
    "forward",
    "backward",
    "reduce",
    "optimizer",
    "save-fsync",
    "save-copy",
    "save-renamed",
    "retention",
)
OTHERS = [Link(phase, rank) for phase in PHASES for rank in (FIRST, LAST)]


@dataclass(frozen=True)
class Chain:
    """What came of a chain: outcomes by link and of the last launch, the committed steps after each launch."""

    broken: dict[Link, Outcome]
    committed: dict[Link, list[int]]
    last: Outcome
    result: Result


def forge(lab: Lab, name: str, links: list[Link]) -> Chain:
    lab.copy("base", name, [3])
    broken, committed, struck = {}, {}, {}
    ended = time.time()
    for link in links:
        mark = lab.folder / f"struck-{name}-{link.phase}-{link.rank}"
        started = time.time()
        broken[link] = lab.train(name, fault=f"{link.fault};once={mark}")
        ended = time.time()
        committed[link] = lab.committed(name)
        struck[link] = (started, mark.stat().st_mtime, ended)
    last = succeeded(lab.train(name))
    for link, (started, at, over) in struck.items():
        done = max((step for step, when in lab.begun(name, started) if when < over), default=1) - 1
        again = next(when for step, when in lab.begun(name, over))
        lost = max(0, done - max(committed[link]))
        lab.events.append(
            Event(
                f"a rank killed: {link}",
                "SIGKILL to itself",
                f"{lost} steps",
                f"{over - at:.1f} s",
                f"{again - over:.1f} s",
            )
        )
    return Chain(broken, committed, last, lab.result(name))


@pytest.fixture(scope="module")
def always(lab: Lab) -> Chain:
    return forge(lab, "always", ALWAYS)


@pytest.mark.parametrize("link", ALWAYS, ids=str)
def test_a_killed_rank_ends_the_job_and_leaves_the_last_checkpoint(always: Chain, link: Link) -> None:
    assert always.broken[link].code not in (0, None)
    assert always.broken[link].resumed == 3  # every byte of it was verified
    assert always.committed[link] == [3]


def test_after_all_these_kills_nothing_is_different(always: Chain, base: Result) -> None:
    assert always.last.resumed == 3
    assert always.result == base.after(3)


@pytest.fixture(scope="module")
def others(lab: Lab) -> Chain:
    return forge(lab, "others", OTHERS)


@pytest.mark.faults
@pytest.mark.parametrize("link", OTHERS, ids=str)
def test_a_rank_killed_anywhere_else_ends_the_job_too(others: Chain, link: Link) -> None:
    assert others.broken[link].code not in (0, None)
    index = OTHERS.index(link)
    before = others.committed[OTHERS[index - 1]] if index else [3]
    assert others.broken[link].resumed in (None, max(before))  # None: it had not got as far as to say so
    assert others.committed[link][: len(before)] == before


@pytest.mark.faults
def test_after_the_other_kills_nothing_is_different_either(others: Chain, base: Result) -> None:
    assert others.result == base.after(3)


@pytest.mark.faults
@pytest.mark.parametrize("rank", [FIRST, LAST])
def test_a_rank_killed_while_the_result_is_written(lab: Lab, base: Result, rank: int) -> None:
    name = lab.copy("base", f"finish-{rank}", [9])
    ended = lab.train(name, fault=f"rank={rank};phase=finish;action=kill")
    assert ended.code != 0
    assert lab.committed(name) == [9, STEPS]
    assert not (lab.folder / name / "COMPLETE").exists()
    assert succeeded(lab.train(name)).resumed == STEPS
    assert lab.result(name).weights == base.weights


@pytest.mark.faults
@pytest.mark.parametrize("rank", [FIRST, LAST])
def test_a_rank_killed_while_it_evaluates(lab: Lab, base: Result, rank: int) -> None:
    name = lab.copy("base", f"evaluate-{rank}", [3])
    assert lab.train(name, fault=f"rank={rank};step=8;phase=evaluate;action=kill").code != 0
    kept = lab.committed(name)
    assert succeeded(lab.train(name)).resumed == max(kept)
    assert lab.result(name) == base.after(3)
