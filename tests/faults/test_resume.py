"""C4, N1: a run goes on from any step, on any number of ranks, with any shares at any stage, to the same bits."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import pytest
from support.faults import STEPS, Command, Lab, Outcome, Result, succeeded

from mlx_empire.checkpoint.manifest import Resolved, decode_manifest


@dataclass(frozen=True)
class Move:
    """On how many ranks, from which step, and with which settings a run goes on that began on `source` ranks."""

    ranks: int
    step: int
    settings: tuple[str, ...] = ()
    source: int = 2

    def __str__(self) -> str:
        return " ".join([f"from {self.source} to {self.ranks} ranks at step {self.step}", *self.settings])

    @property
    def name(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", str(self))


ALWAYS = [
    Move(2, 6),
    Move(2, 3, ("memory.zero_stage=3", "memory.shares=[3,1]")),
    Move(1, 6),
    Move(3, 6, ("memory.zero_stage=3", "memory.shares=[1,3,2]")),
]
STAGES = [
    Move(ranks, 3, (f"memory.zero_stage={stage}", shares), source)
    for source in (2, 3)
    for ranks, shares in ((1, "memory.shares=[1]"), (2, "memory.shares=[1,2]"), (3, "memory.shares=[2,1,4]"))
    for stage in range(4)
]


def moved(lab: Lab, moves: list[Move]) -> dict[Move, Outcome]:
    """All moves, those to one number of ranks in one launch."""
    outcomes = {}
    for ranks in sorted({move.ranks for move in moves}):
        mine = [move for move in moves if move.ranks == ranks]
        for move in mine:
            lab.copy("base" if move.source == 2 else "base-3", move.name, [move.step], move.source)
            if move.source - ranks > 1:  # a copy stands in for one node, not for two
                lab.bring_together(move.name, move.source)
        commands = {move.name: Command(move.settings) for move in mine}
        ended = lab.train_many(commands, ranks)
        outcomes |= {move: ended[move.name] for move in mine}
    return outcomes


@pytest.fixture(scope="module")
def always(lab: Lab) -> dict[Move, Outcome]:
    return moved(lab, ALWAYS)


@pytest.mark.parametrize("move", ALWAYS, ids=str)
def test_a_moved_run_comes_to_the_same(
    lab: Lab, base: Result, always: dict[Move, Outcome], move: Move
) -> None:
    outcome = succeeded(always[move])
    assert outcome.resumed == move.step
    assert lab.result(move.name) == base.after(move.step)
    # What was noted of recomputation is taken and noted again, on any number of ranks.
    assert resolved(lab, move.name, STEPS) == resolved(lab, "base", move.step)


def resolved(lab: Lab, name: str, step: int) -> Resolved:
    """What the run's checkpoint of a step says was decided once."""
    manifest = lab.checkpoints(name, 0) / f"step-{step:06d}" / "MANIFEST.json"
    found = decode_manifest(manifest.read_bytes()).resolved
    assert found.unrecomputed is not None
    return found


@pytest.fixture(scope="module")
def stages(lab: Lab, base: Result) -> dict[Move, Outcome]:
    """From two ranks at stage 2, and from three with unequal shares at stage 3, to anything else."""
    succeeded(lab.train("base-3", "memory.zero_stage=3", "memory.shares=[3,1,2]", ranks=3))
    assert lab.result("base-3") == base
    return moved(lab, STAGES)


@pytest.mark.faults
@pytest.mark.parametrize("move", STAGES, ids=str)
def test_stages_shares_and_ranks_do_not_matter(
    lab: Lab, base: Result, stages: dict[Move, Outcome], move: Move
) -> None:
    assert succeeded(stages[move]).resumed == 3
    assert lab.result(move.name) == base.after(3)


@pytest.fixture(scope="module")
def every_step(lab: Lab) -> dict[int, Outcome]:
    """A run that saved every step, gone on with from each of its steps by name."""
    succeeded(lab.train("dense", "run.save_every=1"))
    commands = {}
    for step in range(1, STEPS):
        name = lab.copy("dense", f"from-{step}", range(1, STEPS + 1))
        commands[name] = Command([f"run.resume={step}"])
    ended = lab.train_many(commands)
    return {step: ended[f"from-{step}"] for step in range(1, STEPS)}


@pytest.mark.faults
@pytest.mark.parametrize("step", range(1, STEPS))
def test_every_step_is_as_good_as_any_other(
    lab: Lab, base: Result, every_step: dict[int, Outcome], step: int
) -> None:
    outcome = succeeded(every_step[step])
    assert outcome.resumed == step
    assert lab.result(f"from-{step}") == base.after(step)
    aside = sorted(p.name for p in lab.checkpoints(f"from-{step}", 0).iterdir() if "superseded" in p.name)
    assert [int(name.split("-")[1]) for name in aside] == list(range(step + 1, STEPS + 1))


def test_epochs_end_within_steps(base: Result) -> None:
    """What the name of a step promises: rows of two epochs in one step, and every row once an epoch."""
    in_order = [row for key in sorted(base.samples) for row in base.samples[key]]
    rows = max(in_order) + 1
    assert rows % 6
    assert len(in_order) > rows
    assert sorted(in_order[:rows]) == list(range(rows))


SETTINGS: dict[str, tuple[list[str], int, str]] = {
    "another learning rate": (
        ["optimizer.learning_rate=2e-3"],
        64,
        "optimizer.learning_rate: 0.001 -> 0.002",
    ),
    "a longer cosine": (["run.steps=15"], 64, "run.steps: 12 -> 15"),
    "accepted": (
        ["optimizer.learning_rate=2e-3", "run.accept_changes=[optimizer.learning_rate]"],
        0,
        "0.001 -> 0.002",
    ),
    "harmless": (
        ["run.save_every=4", "run.eval_every=2", "run.keep_last=1", "comm.bucket_bytes=8192"],
        0,
        "going on",
    ),
    "states of 32 bits": (
        ["optimizer.state_bits=32", "run.accept_changes=[optimizer.state_bits]"],
        0,
        "optimizer.state_bits: 8 -> 32",
    ),
    "another dtype": (
        ["model.dtype=float32", "run.accept_changes=[model.dtype]"],
        64,
        "put model.dtype back",
    ),
    "too few steps": (["run.steps=5", "run.accept_changes=[run.steps]"], 64, "is of step 6 already"),
    "other data": (["data.path=other.jsonl"], 64, "data.path: "),
    "a step that is not there": (["run.resume=5"], 64, "has no checkpoint of step 5; there are: 6"),
    "no checkpoint at all": (["run.resume=somewhere/else"], 64, "run.resume: somewhere/else: expected auto"),
    "by path": (["run.resume=base/node-{rank}/step-000009"], 0, "going on after step 9"),
    "never": (["run.resume=never"], 0, "superseded-000006"),
}


@pytest.fixture(scope="module")
def changed(lab: Lab) -> dict[str, Outcome]:
    rows = (lab.folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (lab.folder / "other.jsonl").write_text("".join(reversed(rows)))
    commands = {}
    for case, (settings, _, _) in SETTINGS.items():
        commands[lab.copy("base", case.replace(" ", "-"), [6])] = Command(settings)
    return lab.train_many(commands)


@pytest.mark.faults
@pytest.mark.parametrize("case", SETTINGS)
def test_a_changed_recipe_is_shown_and_refused_unless_it_is_harmless_or_accepted(
    lab: Lab, base: Result, changed: dict[str, Outcome], case: str
) -> None:
    name, (_, code, said) = case.replace(" ", "-"), SETTINGS[case]
    outcome = changed[name]
    assert outcome.code == code, outcome.stderr[-3000:]
    assert said in (outcome.stderr if code else outcome.stdout)
    if code:
        assert not (lab.folder / name / "metrics.jsonl").exists()
    elif case in ("harmless", "by path", "never"):
        assert lab.result(name).weights == base.weights
    else:
        assert lab.result(name).weights != base.weights


@pytest.mark.faults
def test_states_that_were_decoded_stay_near(lab: Lab, base: Result, changed: dict[str, Outcome]) -> None:
    succeeded(changed["states-of-32-bits"])
    curve = lab.result("states-of-32-bits").curve
    assert curve.keys() == base.after(6).curve.keys()
    assert all(abs(curve[step][0] - base.curve[step][0]) < 0.05 for step in curve)


CONSTANT = ["schedule.type=constant", "schedule.final=0"]
HALVED = {
    "released": ["optimizer.in_backward=true", "memory.zero_stage=3"],
    "lion-diet": ["optimizer.name=lion", "optimizer.master_weights=diet", "memory.zero_stage=1"],
    "sgd-none": ["optimizer.name=sgd", "optimizer.master_weights=none", "optimizer.state_bits=32"],
    "packed": ["data.packing=true", "memory.zero_stage=0"],
    "lora": ["tuning.type=lora", "tuning.rank=4", "tuning.dropout=0.1", "memory.zero_stage=3"],
    "dora": ["tuning.type=dora", "tuning.rank=4", "tuning.layers=2", "memory.zero_stage=2"],
    "qlora": ["tuning.type=qlora", "tuning.bits=4", "memory.zero_stage=3"],
}


def halved(lab: Lab, *kinds: str) -> dict[str, Outcome]:
    """Of each kind a whole run, the first half of it, and the second half on from there with other shares."""
    commands = {}
    for kind in kinds:
        ours = [*HALVED[kind], *CONSTANT]
        half = f"run.resume={kind}-half/node-{{rank}}/step-000006"
        commands[f"{kind}-whole"] = Command(ours)
        commands[f"{kind}-half"] = Command([*ours, "run.steps=6"])
        commands[f"{kind}-rest"] = Command([*ours, half, "memory.shares=[1,2]"])
    return lab.train_many(commands)


@pytest.fixture(scope="module")
def tuned(lab: Lab) -> dict[str, Outcome]:
    return halved(lab, "lora", "qlora")


@pytest.mark.parametrize("kind", ["lora", "qlora"])
@pytest.mark.faults
def test_adapters_go_on_over_the_same_base(lab: Lab, tuned: dict[str, Outcome], kind: str) -> None:
    check_halves(lab, tuned, kind)


OTHER_KINDS = ("dora", "released", "lion-diet", "sgd-none", "packed")


@pytest.fixture(scope="module")
def other_kinds(lab: Lab) -> dict[str, Outcome]:
    return halved(lab, *OTHER_KINDS)


@pytest.mark.faults
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_of_training_go_on_too(lab: Lab, other_kinds: dict[str, Outcome], kind: str) -> None:
    check_halves(lab, other_kinds, kind)


def check_halves(lab: Lab, tuned: dict[str, Outcome], kind: str) -> None:
    """Frozen weights are not in the checkpoint: they come from the model's folder again."""
    assert succeeded(tuned[f"{kind}-rest"]).resumed == 6
    assert lab.result(f"{kind}-rest") == lab.result(f"{kind}-whole").after(6)
    if "lora" not in kind and kind != "dora":
        return
    shard = lab.checkpoints(f"{kind}-half", 0) / "step-000006" / "shard-00000-of-00002.safetensors"
    header = shard.read_bytes()
    names = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")]).keys() - {"__metadata__"}
    assert names
    assert all(".lora_" in name or name.split("/")[0].endswith(".m") for name in names)
