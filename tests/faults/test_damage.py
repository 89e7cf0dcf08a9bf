"""C1, C2, C5: a damaged checkpoint is named and never loaded; a copy or the checkpoint before it is used instead."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.faults import Command, Event, Lab, Outcome, Result, first_tensor, flip, succeeded

SHARDS = [f"shard-{rank:05d}-of-00002.safetensors" for rank in range(2)]
NEWEST = "step-000006"


def both(nodes: list[Path], shard: int, damage: Callable[[Path], None]) -> None:
    """Damage a shard and its copy."""
    for node in nodes:
        damage(node / NEWEST / SHARDS[shard])


def _swap(nodes: list[Path]) -> None:
    for node in nodes:
        one, other = (node / NEWEST / name for name in SHARDS)
        one.rename(node / "aside")
        other.rename(one)
        (node / "aside").rename(other)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _edit_manifest(nodes: list[Path]) -> None:
    path = nodes[1] / NEWEST / "MANIFEST.json"
    record = json.loads(path.read_text())
    record["seed"] += 1
    path.write_text(json.dumps(record))


def _edit_everywhere(nodes: list[Path]) -> None:
    for node in nodes:
        path = node / NEWEST / "MANIFEST.json"
        path.write_text(path.read_text().replace('"next_row":36', '"next_row":37'))


def _disagree(nodes: list[Path]) -> None:
    commit = nodes[1] / NEWEST / "COMMIT"
    commit.write_text(json.dumps({"step": 6, "manifest": "0" * 64}))


def _link(nodes: list[Path]) -> None:
    for node in nodes:
        shard = node / NEWEST / SHARDS[1]
        shard.rename(node / "elsewhere")
        shard.symlink_to(node / "elsewhere")


# Case -> (what happens to the two nodes' folders, what the run must say).
ALWAYS: dict[str, tuple[Callable[[list[Path]], None], str]] = {
    "a bit of the first tensor": (
        lambda nodes: both(nodes, 1, lambda p: flip(p, first_tensor(p)[1])),
        "tensor model.embed_tokens.weight/weights: digest",
    ),
    "manifest edited on one node": (_edit_manifest, "MANIFEST.json in "),
}
OTHERS: dict[str, tuple[Callable[[list[Path]], None], str]] = {
    "shard missing": (lambda nodes: both(nodes, 0, Path.unlink), f"{SHARDS[0]} is on none of the nodes; "),
    "shard empty": (lambda nodes: both(nodes, 0, lambda p: p.write_bytes(b"")), "has 0 bytes, expected"),
    "shard cut by a byte": (lambda nodes: both(nodes, 1, _cut), "bytes, expected"),
    "a bit of the header": (lambda nodes: both(nodes, 0, lambda p: flip(p, 20)), "header: digest"),
    "a bit of the last byte": (lambda nodes: both(nodes, 1, lambda p: flip(p, -1)), "/"),
    "shards swapped": (_swap, "expected"),
    "shard behind a link": (_link, SHARDS[1]),
    "manifest missing on one node": (
        lambda nodes: (nodes[0] / NEWEST / "MANIFEST.json").unlink(),
        "MANIFEST.json is missing in ",
    ),
    "manifest cut": (lambda nodes: _cut(nodes[0] / NEWEST / "MANIFEST.json"), "MANIFEST.json in "),
    "manifest edited on all nodes": (_edit_everywhere, "MANIFEST.json in "),
    "commit cut": (lambda nodes: _cut(nodes[1] / NEWEST / "COMMIT"), "COMMIT in "),
    "nodes disagree": (_disagree, "COMMIT in "),
}


def damaged(lab: Lab, cases: dict[str, tuple[Callable[[list[Path]], None], str]]) -> dict[str, Outcome]:
    """Every case on a run of its own with the checkpoints of steps 3 and 6, all in one launch."""
    commands = {}
    for case, (damage, _) in cases.items():
        name = lab.copy("base", case.replace(" ", "-"), [3, 6])
        damage([lab.checkpoints(name, rank) for rank in range(2)])
        commands[name] = Command()
    return lab.train_many(commands)


@pytest.fixture(scope="module")
def always(lab: Lab) -> dict[str, Outcome]:
    return damaged(lab, ALWAYS)


@pytest.fixture(scope="module")
def others(lab: Lab) -> dict[str, Outcome]:
    return damaged(lab, OTHERS)


def check(lab: Lab, base: Result, outcome: Outcome, name: str, said: str) -> None:
    """The damage is named and the checkpoint before it is used; what was damaged is set aside, not overwritten."""
    succeeded(outcome)
    assert outcome.resumed == 3
    (line,) = [line for line in outcome.stdout.splitlines() if "is damaged" in line]
    assert line.startswith(f"WARNING: {NEWEST} is damaged: ")
    assert said in line
    assert "going on from step-000003 instead" in outcome.stdout
    assert lab.result(name) == base.after(3)
    lab.events.append(
        Event(f"checkpoint: {name.replace('-', ' ')}", "file changed", "3 steps", "at the start", "-")
    )
    assert any(path.name.startswith("superseded-000006-") for path in lab.checkpoints(name, 0).iterdir())


@pytest.mark.parametrize("case", ALWAYS)
def test_damage_is_named_and_the_checkpoint_before_is_used(
    lab: Lab, base: Result, always: dict[str, Outcome], case: str
) -> None:
    name = case.replace(" ", "-")
    check(lab, base, always[name], name, ALWAYS[case][1])


@pytest.mark.faults
@pytest.mark.parametrize("case", OTHERS)
def test_every_other_damage_is_named_too(
    lab: Lab, base: Result, others: dict[str, Outcome], case: str
) -> None:
    name = case.replace(" ", "-")
    check(lab, base, others[name], name, OTHERS[case][1])


def _all_commits(nodes: list[Path]) -> None:
    for node in nodes:
        (node / NEWEST / "COMMIT").unlink()


# What costs nothing: case -> (damage, step gone on from, what the run must say).
HEALED: dict[str, tuple[Callable[[list[Path]], None], int, str]] = {
    "own shard damaged": (
        lambda n: flip(n[0] / NEWEST / SHARDS[0], -1),
        6,
        "its copy on another node is used",
    ),
    "copy damaged": (lambda n: flip(n[1] / NEWEST / SHARDS[0], -1), 6, "going on"),
    "own shard missing": (lambda n: (n[1] / NEWEST / SHARDS[1]).unlink(), 6, f"{SHARDS[1]}, written to "),
    "commit on one node only": (lambda n: (n[0] / NEWEST / "COMMIT").unlink(), 6, "going on"),
    "commit nowhere": (_all_commits, 3, f"{NEWEST} was never committed"),
    "a node's folder gone": (lambda n: shutil.rmtree(n[1]), 6, f"{SHARDS[1]}, written to "),
}


@pytest.fixture(scope="module")
def healed(lab: Lab) -> dict[str, Outcome]:
    return damaged(lab, {case: (damage, said) for case, (damage, _, said) in HEALED.items()})


@pytest.mark.faults
@pytest.mark.parametrize("case", HEALED)
def test_what_a_copy_can_stand_in_for_costs_nothing(
    lab: Lab, base: Result, healed: dict[str, Outcome], case: str
) -> None:
    name, (_, step, said) = case.replace(" ", "-"), HEALED[case]
    outcome = succeeded(healed[name])
    assert outcome.resumed == step
    assert said in outcome.stdout
    assert lab.result(name) == base.after(step)
    lab.events.append(Event(f"checkpoint: {case}", "file changed", f"{6 - step} steps", "at the start", "-"))


@pytest.mark.faults
def test_a_node_that_left_takes_nothing_with_it(lab: Lab, base: Result) -> None:
    """The first node's folder is gone, then the node: the other one goes on alone, from the copies."""
    name = lab.copy("base", "left", [3, 6])
    shutil.rmtree(lab.checkpoints(name, 0))
    lab.checkpoints(name, 1).rename(lab.checkpoints(name, 0))  # it is rank 0 now
    outcome = succeeded(lab.train(name, ranks=1))
    assert outcome.resumed == 6
    assert lab.result(name) == base.after(6)


@pytest.mark.faults
def test_without_any_whole_checkpoint_the_run_refuses_to_begin_anew(lab: Lab) -> None:
    name = lab.copy("base", "hopeless", [6])
    for rank in range(2):
        flip(lab.checkpoints(name, rank) / NEWEST / SHARDS[0], -1)
    outcome = lab.train(name)
    assert outcome.code == 65
    assert "no checkpoint is whole: step-000006 is damaged: " in outcome.stderr
    assert "run.resume: never" in outcome.stderr
    assert not (lab.folder / name / "metrics.jsonl").exists()
