"""The same run on one, two and three ranks, any shares, any stage, any folder: the same result, to the bit.

Everything is compared with `==` with the run of one process that never heard of MPI.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from train.clocks import CLOCKS, by_hand
from train.launching import (
    MODEL,
    SPEECHES,
    WORDNET,
    Workspace,
    curve,
    held_out,
    metrics,
    raw_tensors,
    step_records,
    succeeded,
)

from mlx_empire.cluster.hostfile import Node
from mlx_empire.model.build import build_model, describe
from mlx_empire.model.config import read_config
from mlx_empire.optim.choose import make_optimizer
from mlx_empire.plan.resolve import resolve
from mlx_empire.plan.schedule import training_step
from mlx_empire.plan.shares import RunPlan
from mlx_empire.plan.step_traffic import step_traffic
from mlx_empire.plan.traffic import card_bytes
from mlx_empire.plan.workload import step_shape
from mlx_empire.recipe.load import load_recipe

GIB = 2**30

# What must not change a bit of the result, and what each run of a launch asks for beside run.dir.
SPREAD = {
    2: ["memory.zero_stage=3", "memory.shares=[2,1]", "memory.gradient_checkpointing=true"],
    3: ["memory.shares=[1,3,2]", "comm.bucket_bytes=8192"],
}
# Runs in a group must agree with each other, and on two ranks with one.
VARIANTS: dict[str, list[str]] = {
    "plain/stage 0, nothing recomputed": ["memory.zero_stage=0", "memory.gradient_checkpointing=false"],
    "plain/stage 1, all recomputed": ["memory.zero_stage=1", "memory.gradient_checkpointing=true"],
    "plain/stage 2, auto": ["memory.zero_stage=2", "memory.gradient_checkpointing=auto"],
    "plain/stage 3, nothing recomputed": ["memory.zero_stage=3", "memory.gradient_checkpointing=false"],
    "packed/stage 3": ["data.packing=true", "memory.zero_stage=3", "memory.gradient_checkpointing=true"],
    "packed/stage 0": ["data.packing=true", "memory.zero_stage=0", "memory.gradient_checkpointing=false"],
    "8 bit/stage 2": ["optimizer.state_bits=8", "memory.zero_stage=2"],
    "8 bit/stage 3": ["optimizer.state_bits=8", "memory.zero_stage=3", "memory.shares=[3,1]"],
    "bfloat16/stage 3": ["model.dtype=bfloat16", "memory.zero_stage=3"],
    "bfloat16/stage 1": ["model.dtype=bfloat16", "memory.zero_stage=1"],
    "chat/stage 2": [f"data.path={WORDNET}", "data.format=chat", "batch.micro_size=3", "batch.cells=2"],
}
# By wall time, on ranks whose clocks disagree.
TIMED = [
    "clocks",
    "recipe.yaml",
    "run.dir=timed",
    "run.steps=8",
    "run.save_every=30min",
    "run.eval_every=45min",
]
ON_ONE = [
    "plain/stage 0, nothing recomputed",
    "packed/stage 3",
    "8 bit/stage 2",
    "bfloat16/stage 3",
    "chat/stage 2",
]
GROUPS = sorted({name.split("/")[0] for name in VARIANTS})


def result(run: Path) -> tuple[Any, ...]:
    """What may not depend on how the run was spread out."""
    return curve(run), held_out(run), raw_tensors(run / "final")


def planned(run: Path) -> RunPlan:
    """The plan that a run's own recipe, nodes and model give, made anew."""
    recipe = load_recipe(run / "recipe.yaml")
    config = read_config(recipe.model.path)
    name = str(recipe.model.path)
    spec = describe(build_model(config, name), config, name, "float32")
    nodes = [Node(**entry["node"]) for entry in json.loads((run / "plan.json").read_text())["ranks"]]
    optimizer = make_optimizer(recipe.optimizer)
    return resolve(recipe, spec, nodes, optimizer.state_bytes)


# ---- one, two and three ranks


@pytest.fixture(scope="module", params=[2, 3])
def spread(request: pytest.FixtureRequest, workspace: Workspace) -> tuple[int, Path]:
    """A run under mpirun with a hostfile: its number of ranks and its folder."""
    ranks = request.param
    hosts = workspace.write(
        f"hosts-{ranks}.txt", f"# one machine\nlocalhost slots={ranks}  # role=king memory=6GiB limit=3GiB\n"
    )
    run = f"on-{ranks}"
    settings = [f"run.dir={run}", "run.eval_every=3", "report.trace=true", *SPREAD[ranks]]
    succeeded(workspace.train("recipe.yaml", *settings, ranks=ranks, hostfile=hosts))
    return ranks, workspace.folder / run


def test_the_result_is_that_of_one_process(spread: tuple[int, Path], alone_dir: Path) -> None:
    _, run = spread
    assert len(raw_tensors(run / "final")) == 47
    assert result(run) == result(alone_dir)


def test_mpirun_s_hostfile_is_found_and_its_machine_divided(spread: tuple[int, Path]) -> None:
    ranks, run = spread
    entries = json.loads((run / "plan.json").read_text())["ranks"]
    assert [entry["node"]["role"] for entry in entries] == ["king"] * ranks
    assert [entry["node"]["memory_bytes"] for entry in entries] == [6 * GIB // ranks] * ranks
    assert [entry["limit_bytes"] for entry in entries] == [3 * GIB // ranks] * ranks


def test_the_plan_on_disk_is_the_planner_s(spread: tuple[int, Path]) -> None:
    _, run = spread
    plan, written = planned(run), json.loads((run / "plan.json").read_text())
    assert (written["zero_stage"], written["tail"]) == (plan.shards.zero_stage, plan.work.unrecomputed)
    assert [entry["share"] for entry in written["ranks"]] == list(plan.shards.shares)
    assert [entry["ledger"] for entry in written["ranks"]] == [one.items() for one in plan.ledgers]


def test_bytes_moved_are_the_planned_ones(spread: tuple[int, Path]) -> None:
    ranks, run = spread
    plan = planned(run)
    sent, received = map(list, zip(*card_bytes(step_traffic(plan.shards, plan.work)), strict=True))
    assert sum(sent) == sum(received) > 279_232 * 4
    for record in step_records(run):
        assert len(record["bytes_sent"]) == len(record["bytes_received"]) == ranks
        assert record["bytes_sent"] == sent
        assert record["bytes_received"] == received


def test_memory_of_every_rank_is_beside_its_prediction(spread: tuple[int, Path]) -> None:
    ranks, run = spread
    expected = [entry["peak_bytes"] for entry in json.loads((run / "plan.json").read_text())["ranks"]]
    for record in step_records(run):
        assert record["predicted_peak_bytes"] == expected
        assert len(record["peak_bytes"]) == ranks
        assert all(0 < peak <= 1.1 * most for peak, most in zip(record["peak_bytes"], expected, strict=True))


def test_what_a_step_waited_for_is_told_by_cause(spread: tuple[int, Path]) -> None:
    """At stage 3 for weights and reductions, below it for reductions and renewed weights; for a save where one runs; at
    stage 3, where the main thread runs ahead, for the update before."""
    _, run = spread
    plan = planned(run)
    ahead = ["update"] if plan.work.run_ahead else []
    causes = ["gather", *ahead] if plan.shards.zero_stage == 3 else ["renew"]
    for record in step_records(run):
        assert record["waited_for"].keys() == {*causes, "reduce", "save"}
        network = sum(seconds for cause, seconds in record["waited_for"].items() if cause != "save")
        assert network == pytest.approx(record["comm_wait_seconds"])


def test_the_trace_holds_every_action_of_the_plan_on_every_rank(spread: tuple[int, Path]) -> None:
    """Three steps were traced; what only begins an exchange is told by the thread that carries it out. Before them
    every unit was loaded."""
    ranks, run = spread
    plan = planned(run)
    trace = json.loads((run / "trace.json").read_text())["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in trace if e["name"] == "process_name"}
    assert (
        sorted(name.split(",")[1] for name in processes.values())
        == [" measured"] * ranks + [" predicted"] * ranks
    )
    for rank in range(ranks):
        shape = step_shape(plan.shards, plan.work, rank)
        (process,) = (
            p for p, n in processes.items() if n.startswith(f"rank {rank} ") and n.endswith("measured")
        )
        names = Counter(e["name"] for e in trace if e["ph"] == "X" and e["pid"] == process)
        units = {-1: "", 0: "root"} | {u: f"layer {u}" for u in range(1, shape.layers + 1)}
        expected = Counter(
            f"{a.kind} {'' if a.kind == 'head' else units[a.unit]}".rstrip() for a in training_step(shape)
        )
        loads = {f"load {units[u]}": 1 for u in range(shape.layers + 1)}
        assert names == Counter({name: 3 * count for name, count in expected.items()} | loads)


# ---- rank 0 alone has the folders


@pytest.fixture(scope="module")
def two_machines(workspace: Workspace) -> tuple[Path, Path, Path]:
    """Three working directories with the same recipe: with model and data, with neither, with the model only."""
    king, bare, half = (workspace.folder / name for name in ("king", "bare", "half"))
    for folder in (king, bare, half):
        folder.mkdir()
        shutil.copy(workspace.folder / "recipe.yaml", folder)
    for folder in (king, half):
        shutil.copytree(MODEL, folder / "model")
    shutil.copytree(SPEECHES, king / "data")
    (bare / "recipe.yaml").unlink()  # the recipe too is rank 0's to read
    return king, bare, half


@pytest.mark.parametrize("second", ["bare", "half"])
def test_what_only_rank_0_has_is_sent(
    workspace: Workspace, two_machines: tuple[Path, Path, Path], alone_dir: Path, second: str
) -> None:
    king, bare, half = two_machines
    other = {"bare": bare, "half": half}[second]
    before = sorted(path for path in other.rglob("*"))
    settings = ["model.path=model", "data.path=data", f"run.dir=beside-{second}", "run.eval_every=3"]
    stage = ["memory.zero_stage=3", "memory.shares=[1,2]"] if second == "bare" else []
    ended = succeeded(workspace.train("recipe.yaml", *settings, *stage, folders=[king, other]))
    assert result(king / f"beside-{second}") == result(alone_dir)
    assert "data read by rank 0 and sent to the other ranks" in ended.stdout
    assert ("weights read by rank 0" in ended.stdout) == (second == "bare")
    assert sorted(path for path in other.rglob("*")) == before  # rank 1 writes nothing


def test_data_that_differ_are_refused_once(
    workspace: Workspace, two_machines: tuple[Path, Path, Path]
) -> None:
    king = two_machines[0]
    other = workspace.folder / "other"
    shutil.copytree(MODEL, other / "model")
    (other / "data").mkdir()
    (other / "data" / "train.jsonl").write_bytes((SPEECHES / "valid.jsonl").read_bytes())
    settings = ["model.path=model", "data.path=data", "run.dir=differ"]
    ended = workspace.train("recipe.yaml", *settings, folders=[king, other])
    assert ended.code == 64
    assert len(ended.said) == 1, ended.said
    assert "data.path" in ended.said[0]
    assert "different data" in ended.said[0]
    assert not (king / "differ").exists()


def test_a_damaged_copy_of_the_model_names_its_machine(
    workspace: Workspace, two_machines: tuple[Path, Path, Path]
) -> None:
    king = two_machines[0]
    other = workspace.folder / "damaged"
    shutil.copytree(king, other, ignore=shutil.ignore_patterns("beside-*"))
    weights = other / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:300_000])
    ended = workspace.train(
        "recipe.yaml", "model.path=model", "data.path=data", "run.dir=cut", folders=[king, other]
    )
    assert ended.code == 64
    assert len(ended.said) == 1, ended.said
    assert ended.said[0].startswith("rank 1 on ")
    assert "model/model.safetensors" in ended.said[0]
    assert not (king / "cut").exists()


# ---- settings that change the result, and settings that must not


@pytest.fixture(scope="module")
def variants(workspace: Workspace) -> dict[int, dict[str, Path]]:
    """Each variant's folder, by the number of ranks."""
    folders: dict[int, dict[str, Path]] = {}
    for ranks, names in ((1, ON_ONE), (2, list(VARIANTS))):
        folders[ranks] = {
            name: workspace.folder / f"variants-{ranks}" / name.replace("/", "-") for name in names
        }
        commands = {
            name: ["recipe.yaml", *VARIANTS[name], "run.steps=2", "run.eval_every=2", f"run.dir={folder}"]
            for name, folder in folders[ranks].items()
            if ranks == 2 or "shares" not in " ".join(VARIANTS[name])
        }
        commands |= {"timed": TIMED} if ranks == 2 else {}
        for outcomes in workspace.train_many(commands, ranks):
            for outcome in outcomes.values():
                succeeded(outcome)
    return folders


@pytest.mark.parametrize("group", GROUPS)
def test_what_may_not_matter_does_not(variants: dict[int, dict[str, Path]], group: str) -> None:
    runs = [run for made in variants.values() for name, run in made.items() if name.split("/")[0] == group]
    assert len(runs) >= 2
    first = result(runs[0])
    assert len(first[0]) == 2
    for run in runs[1:]:
        assert result(run) == first, run


def test_what_must_matter_does(variants: dict[int, dict[str, Path]]) -> None:
    weights = [raw_tensors(variants[1][name] / "final") for name in ON_ONE]
    for i, one in enumerate(weights):
        assert all(one != other for other in weights[i + 1 :])


def test_bfloat16_is_stored_as_such(variants: dict[int, dict[str, Path]]) -> None:
    final = variants[2]["bfloat16/stage 3"] / "final"
    assert {dtype for dtype, _, _ in raw_tensors(final).values()} == {"BF16"}
    config = json.loads((final / "config.json").read_text())
    assert config.get("torch_dtype", config.get("dtype")) == "bfloat16"


def test_both_ranks_save_and_evaluate_when_the_clock_of_rank_0_says(
    variants: dict[int, dict[str, Path]], workspace: Workspace
) -> None:
    run = workspace.folder / "timed"
    assert [record["time"] for record in step_records(run)] == [60.0 * minutes for minutes in CLOCKS[0][1:]]
    saved = sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
    assert saved == [*by_hand(30), 8] == [3, 7, 8]
    evaluated = [record["step"] for record in metrics(run) if "eval_loss" in record]
    assert evaluated == [0, *by_hand(45), 8] == [0, 6, 8]


def test_a_run_that_goes_on_counts_wall_time_from_its_new_beginning(
    workspace: Workspace, variants: dict[int, dict[str, Path]]
) -> None:
    """From step 3 on, by clocks that begin anew: the third step from there is the first of 30 minutes."""
    timed, run = workspace.folder / "timed", workspace.folder / "timed-on"
    shutil.copytree(timed / "checkpoints/step-000003", run / "checkpoints/step-000003")
    (ended, _) = workspace.train_many({"on": [*TIMED, "run.dir=timed-on"]}, 2)
    succeeded(ended["on"])
    saved = sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
    assert saved == [3, 3 + by_hand(30)[0], 8] == [3, 6, 8]
    assert [record["step"] for record in step_records(run)] == [4, 5, 6, 7, 8]
    assert raw_tensors(run / "final") == raw_tensors(timed / "final")


def test_fewer_bits_of_state_take_less_memory(variants: dict[int, dict[str, Path]]) -> None:
    def state(name: str) -> int:
        ledgers = [
            rank["ledger"] for rank in json.loads((variants[2][name] / "plan.json").read_text())["ranks"]
        ]
        return sum(size for one in ledgers for part, size in one.items() if part.startswith("optimizer"))

    assert state("8 bit/stage 2") < 0.35 * state("plain/stage 2, auto")
    wide, coded = (
        metrics(variants[2][name])[-1]["eval_loss"] for name in ("plain/stage 2, auto", "8 bit/stage 2")
    )
    assert abs(coded - wide) < 0.01 * wide
