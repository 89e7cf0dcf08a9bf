"""The command for many daughters: memory says how many at a time, a kill loses nobody who was finished."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.utils import load_model, load_tokenizer, quantize_model, save
from support.mpi import ROOT
from train.launching import MODEL, Outcome, Workspace, curve, held_out, jsonl, metrics, raw_tensors, succeeded
from train.people import command, hostfile, run, started, with_people, worker
from train.test_result import TRAIN, VALID

from mlx_empire.cluster.hostfile import Node
from mlx_empire.daughters.machine import capacity_for
from mlx_empire.daughters.saved import resume_point_of
from mlx_empire.recipe.load import load_recipe
from mlx_empire.run.lock import RUN, is_held

POISON = str(ROOT / "tests" / "support" / "poison.py")
NAMES = ("anna", "bert", "carl", "dora")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Four people, each with other rows; what one machine may use is enough for two at a time."""
    return with_people(tmp_path_factory.mktemp("daughters"), NAMES)


@pytest.fixture(scope="module")
def limit(place: Workspace) -> int:
    """Bytes that hold two daughters and not three."""
    recipe = load_recipe(place.folder / "recipe.yaml")
    peaks = {}
    for count in (2, 3):
        capacity = capacity_for(recipe, Node("here", 1, None, 1 << 40, 1 << 40), count)
        assert capacity.places == count
        peaks[count] = capacity.plan.ledgers[0].peak
    assert peaks[2] < peaks[3]
    return (peaks[2] + peaks[3]) // 2


@pytest.fixture(scope="module")
def together(place: Workspace, limit: int) -> Outcome:
    return succeeded(run(place, "--hosts", hostfile(place, limit)))


def test_never_more_at_once_than_fit(place: Workspace, together: Outcome, limit: int) -> None:
    assert "4 of 4 daughters, up to 2 together" in together.stdout
    assert "4 of 4 daughters are in runs" in together.stdout
    most = []
    for name in NAMES:
        records = [r for r in metrics(place.folder / "runs" / name) if "eval_loss" not in r]
        assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
        most += [r["together"] for r in records]
        assert max(r["peak_bytes"][0] for r in records) <= limit
        assert (place.folder / "runs" / name / "COMPLETE").exists()
    assert max(most) == 2


def test_each_is_what_she_is_alone(place: Workspace, together: Outcome) -> None:
    """By the command for one, with the same recipe: the same first values, losses and adapter, to a few 1e-5."""
    for name in NAMES[:2]:
        alone = f"alone-{name}"
        succeeded(place.train("recipe.yaml", f"data.path=people/{name}", f"run.dir={alone}"))
        ours, theirs = (
            [r["eval_loss"] for r in metrics(place.folder / where) if "eval_loss" in r]
            for where in (f"runs/{name}", alone)
        )
        assert ours == pytest.approx(theirs, rel=1e-4)
        assert ours[-1] < ours[0]
        steps, losses, _ = zip(*curve(place.folder / "runs" / name), strict=True)
        assert losses == pytest.approx([loss for _, loss, _ in curve(place.folder / alone)], rel=1e-4)
        assert len(set(losses)) == len(steps)
        found, expected = (raw_tensors(place.folder / where / "final") for where in (f"runs/{name}", alone))
        assert found.keys() == expected.keys()
        for tensor, (dtype, shape, raw) in expected.items():
            assert found[tensor][:2] == (dtype, shape)
            values, should = (np.frombuffer(data, np.float32) for data in (found[tensor][2], raw))
            assert np.abs(values - should).max() < 2e-4, tensor
        model, _ = mlx_lm.load(str(MODEL), adapter_path=str(place.folder / "runs" / name / "final"))
        assert mx.isfinite(model(mx.array([TRAIN[0]]))).all()


@pytest.mark.parametrize("way", [pytest.param("two workers", marks=pytest.mark.slow), "one worker"])
def test_in_company_each_has_the_bits_that_it_has_alone(place: Workspace, way: str) -> None:
    """Rows of other lengths, on both sides of 256 positions from where attention goes another way, under dropout: one
    machine's three side by side, or two and one under mpirun, have the bits of three who come one after another.
    """
    lengths = {"long": 400, "middle": 270, "short": 60}
    for number, (name, length) in enumerate(lengths.items()):
        tokens = [[3 + (7 * i + 31 * row + number) % 200 for i in range(length)] for row in range(2)]
        place.write(f"lengths/{name}/train.jsonl", jsonl({"tokens": own} for own in tokens))
    words = ["--people", "lengths", "data.sequence_length=416", "tuning.dropout=0.1", "run.steps=2"]
    words += ["run.eval_every=null"]
    succeeded(worker(place, *words, "--together", 1, f"run.dir=single {way}"))
    if way == "one worker":
        assert "up to 3 together" in succeeded(worker(place, *words, f"run.dir=company {way}")).stdout
    else:
        hosts = hostfile(place, 1 << 30, slots=2)
        said = succeeded(run(place, *words, "--hosts", hosts, f"run.dir=company {way}")).stdout
        assert sorted(re.findall(r"(\d) of 3 daughters, up to", said)) == ["1", "2"]
    for name in lengths:
        company, single = (place.folder / f"{how} {way}" / name for how in ("company", "single"))
        assert curve(company) == curve(single)
        assert raw_tensors(company / "final") == raw_tensors(single / "final")


def test_so_it_has_with_dora_on_a_base_that_is_stored_packed(place: Workspace) -> None:
    """Four bits, as mlx-lm packs them; and the adapter opens on that base."""
    packed, config = quantize_model(*load_model(MODEL), 64, 4)
    save(place.folder / "packed", MODEL, packed, load_tokenizer(MODEL), config)
    words = [
        "model.path=packed",
        "tuning.type=dora",
        "tuning.dropout=0.1",
        "run.steps=2",
        "--only=anna",
        "--only=bert",
    ]
    assert "up to 2 together" in succeeded(worker(place, *words, "run.dir=dora")).stdout
    succeeded(worker(place, *words, "--together", 1, "run.dir=single-dora"))
    for name in NAMES[:2]:
        company, single = (place.folder / folder / name for folder in ("dora", "single-dora"))
        assert curve(company) == curve(single)
        assert raw_tensors(company / "final") == raw_tensors(single / "final")
    model, _ = mlx_lm.load(str(place.folder / "packed"), adapter_path=str(place.folder / "dora/anna/final"))
    assert mx.isfinite(model(mx.array([TRAIN[0]]))).all()


def test_given_again_it_does_nothing(place: Workspace, together: Outcome) -> None:
    before = {
        p: p.stat().st_mtime_ns
        for p in (place.folder / "runs").rglob("*")
        if p.is_file() and p.name != "LOCK"
    }
    again = succeeded(run(place))
    assert again.stdout.startswith("4 of 4 daughters are in runs\n")
    assert all(p.stat().st_mtime_ns == at for p, at in before.items())


def test_a_kill_loses_no_finished_daughter_and_repeats_none(
    place: Workspace, together: Outcome, limit: int
) -> None:
    """Killed without warning when two are finished; started again, the others begin anew and all are as before."""
    words = ["--hosts", hostfile(place, limit), "run.dir=killed"]
    line, environment = command(place, *words)
    output = place.folder / "killed.txt"
    with output.open("w") as file:
        process = subprocess.Popen(line, cwd=place.folder, env=environment, stdout=file, stderr=file)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if len(list((place.folder / "killed").glob("*/COMPLETE"))) >= 2:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(1.5)  # the worker finds its pipe closed and ends
    finished = {p.parent.name: p.stat().st_mtime_ns for p in (place.folder / "killed").glob("*/COMPLETE")}
    assert len(finished) >= 2
    again = run(place, *words)
    assert again.code == 0, again.stderr
    for name, at in finished.items():
        assert (place.folder / "killed" / name / "COMPLETE").stat().st_mtime_ns == at
        assert f"{name}: training" not in again.stdout
    for name in NAMES:
        found = raw_tensors(place.folder / "killed" / name / "final")
        expected = raw_tensors(place.folder / "runs" / name / "final")
        assert found.keys() == expected.keys()
        for tensor in expected:
            values, should = (np.frombuffer(one[tensor][2], np.float32) for one in (found, expected))
            assert np.abs(values - should).max() < 2e-4


def test_a_worker_that_outlives_its_command_keeps_the_folder(place: Workspace) -> None:
    """While it is busy it does not know that nobody listens: a second one beside it would write the same files."""
    line, environment = command(place, "--only=anna", "run.dir=outlived")
    environment["MLX_EMPIRE_FAULT"] = "phase=evaluate;action=delay;seconds=6"
    process = subprocess.Popen(line, cwd=place.folder, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any("anna: training" in said for said in process.stdout)
    process.kill()
    process.wait()
    second = run(place, "--only=anna", "run.dir=outlived")
    assert second.code == 64
    assert f"run.dir: outlived: is in use by process {process.pid} on " in second.stderr
    deadline = time.monotonic() + 60
    while is_held(place.folder / "outlived", RUN):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    succeeded(run(place, "--only=anna", "run.dir=outlived"))


def test_unfinished_daughters_go_on_where_they_were_saved(place: Workspace) -> None:
    """Killed in a step, when one is done but not yet written, and while files are saved: in the end all is equal, bit
    for bit, to a command that nothing happened to. The four have other numbers of steps, so company changes on the
    way: whoever is saved or done, all are saved. `step` counts the steps of a launch. In the last launch two are left,
    who were in places 1 and 2 of 3.
    """
    steps = {"two": 2, "six": 6, "five": 5, "late": 2}  # by bytes of data, the most first
    for (name, count), rows in zip(steps.items(), (TRAIN[3:5], TRAIN, TRAIN[:5], TRAIN[:2]), strict=True):
        assert len(rows) == count
        valid = VALID[:1] * (20 if name == "two" else 1)
        for split, own in (("train", rows), ("valid", valid)):
            place.write(f"uneven/{name}/{split}.jsonl", jsonl({"tokens": tokens} for tokens in own))
    words = ["--people", "uneven", "--together", 3, "run.steps=2ep", "run.save_every=5", "tuning.dropout=0.1"]
    succeeded(worker(place, *words, "run.dir=whole"))
    kept = []
    for fault in ("step=4;phase=forward", "step=2;phase=finish", "step=1;phase=save-rename"):
        assert worker(place, *words, "run.dir=onward", fault=f"{fault};action=kill").code == -signal.SIGKILL
        kept.append(steps_kept(place.folder / "onward"))
    assert kept == [{"five": 2, "six": 2}, {"five": 4, "late": 2, "six": 4}, {"five": 4, "six": 4}]
    again = succeeded(run(place, *words, "run.dir=onward"))
    assert "2 of 2 daughters, up to 3 together" in again.stdout
    assert again.stdout.count("goes on after step 4") == 2
    for name, count in steps.items():
        onward, whole = (place.folder / folder / name for folder in ("onward", "whole"))
        assert [step for step, _, _ in curve(onward)] == list(range(1, count + 1))
        assert curve(onward) == curve(whole)
        assert held_out(onward) == held_out(whole)
        assert raw_tensors(onward / "final") == raw_tensors(whole / "final")
    assert steps_kept(place.folder / "onward") == {}
    assert not list((place.folder / "onward").rglob(".*"))


def steps_kept(folder: Path) -> dict[str, int]:
    """The step of each daughter who has a file to go on from."""
    found = {run.name: resume_point_of(run) for run in sorted(folder.iterdir()) if run.is_dir()}
    return {name: point.step for name, point in found.items() if point is not None}


def test_what_is_not_hers_any_more_is_not_gone_on_from(place: Workspace) -> None:
    """Of four who were interrupted one has other rows by now, and one another's recipe: they fail alone, and what they
    have is kept until somebody says `run.resume: never`. One has a damaged file and begins anew; one goes on.
    """
    names = ("apt", "bad", "new", "old")
    for number, name in enumerate(names):
        rows = [{"tokens": tokens} for tokens in TRAIN[number : number + 2]]
        place.write(f"changed/{name}/train.jsonl", jsonl(rows))
    words = ["--people", "changed", "run.dir=changed-runs", "run.eval_every=null", "run.save_every=2"]
    assert worker(place, *words, fault="step=4;phase=forward;action=kill").code == -signal.SIGKILL
    files = {name: place.folder / "changed-runs" / name / "unfinished.safetensors" for name in names}
    place.write("changed/new/train.jsonl", jsonl([{"tokens": TRAIN[5]}]))
    raw = bytearray(files["bad"].read_bytes())
    raw[-5] ^= 1
    files["bad"].write_bytes(raw)
    recipe = files["old"].read_bytes()
    assert recipe.count(b"learning_rate: 0.005") == 1
    files["old"].write_bytes(recipe.replace(b"learning_rate: 0.005", b"learning_rate: 0.004"))
    kept = {name: files[name].read_bytes() for name in ("new", "old")}
    ended = run(place, *words, fault="phase=save-rename;action=enospc")
    said = ended.stdout
    assert ended.code == 65
    assert "apt: training on" in said
    assert said.count("could not be saved: No space left on device") == 5  # and nobody ends for that
    assert not list((place.folder / "changed-runs").rglob(".*"))
    for name, note in {
        "apt": "training on [^:]*: goes on after step 2",
        "new": "failed on [^:]*: .*changed/new holds other rows .*run.resume=never",
        "bad": "training on [^:]*: begins anew: changed-runs/bad/unfinished.safetensors: damaged",
        "old": "failed on [^:]*: .*learning_rate: 0.004 -> 0.005.*put the old values back",
    }.items():
        assert re.search(f"{name}: {note}", said), said
    assert {name: files[name].read_bytes() for name in kept} == kept
    succeeded(worker(place, *words, "run.resume=never"))
    for name in names:
        assert [step for step, _, _ in curve(files[name].parent)] == [1, 2, 3, 4, 5, 6]


def test_two_machines_share_the_work(place: Workspace, limit: int) -> None:
    """Two workers under mpirun, each with room for two."""
    ended = succeeded(run(place, "--hosts", hostfile(place, limit, slots=2), "run.dir=spread", "run.steps=2"))
    assert len(re.findall(r"2 of 4 daughters, up to 2 together", ended.stdout)) == 2
    assert len(list((place.folder / "spread").glob("*/COMPLETE"))) == 4


def test_one_persons_bad_data_or_disk_fails_alone(place: Workspace) -> None:
    """One cannot be evaluated at the end, another's result cannot be written: nobody else has held-out rows, and
    none is done before it.
    """
    for name in ("good", "scored", "written"):
        place.write(
            f"some/{name}/train.jsonl", jsonl([{"tokens": TRAIN[0]}] * (2 if name == "written" else 1))
        )
    place.write("some/scored/valid.jsonl", jsonl([{"tokens": VALID[0][:9]}]))
    place.write("some/bad/train.jsonl", '{"tokens": [5, 99999]}\n')
    words = ["--people", "some", "run.dir=partly", "run.eval_every=null", "run.steps=2", "run.save_every=1"]
    words += ["run.eval_batches=3"]
    full = "action=enospc"
    ended = run(place, *words, fault=f"step=2;phase=evaluate;{full} phase=finish;once=struck;{full}")
    assert ended.code == 65
    said = ended.stdout.replace("\n", "")
    idle = r"without effect here: [^\n]*run\.eval_batches: 3 \(run\.eval_every is null"
    assert len(re.findall(idle, ended.stdout)) == 1
    assert "bad: failed" in said
    assert "some/bad/train.jsonl:1: token id 99999" in said
    for name in ("scored", "written"):
        assert re.search(rf"{name}: failed on [^:]*: \[Errno 28\] No space left on device", said), said
    assert "1 of 4 daughters are in partly" in said
    assert [p.parent.name for p in (place.folder / "partly").glob("*/COMPLETE")] == ["good"]
    assert steps_kept(place.folder / "partly") == {"scored": 1, "written": 2}


def test_a_gradient_that_is_not_finite_leaves_nothing_to_go_on_from(place: Workspace) -> None:
    place.write("odd/one/train.jsonl", jsonl([{"tokens": TRAIN[0]}]))
    words = ["--people", "odd", "run.dir=odd-runs", "run.eval_every=null", "run.save_every=1"]
    line, environment = command(place, *words, "--work")
    at = line.index("-m")
    ended = started(place, [*line[:at], POISON, "forward", "3", *line[at + 1 :]], environment)
    assert ended.code == 65
    assert "step 3: its gradient is not finite" in ended.stdout
    assert steps_kept(place.folder / "odd-runs") == {}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--people", "nowhere"], 64, "--people: nowhere: no such folder"),
        (["tuning.type=full", "tuning.rank=null"], 64, "tuning.type: full: daughters are adapters"),
        (["data.path=null", "data.sources=[{path: a}]"], 64, "data.sources: a: each person's rows are in"),
        (["--together", "0"], 64, "at least one at a time"),
        (["run.resume=4"], 64, "run.resume: 4: each daughter goes on from its own last step"),
        (["--hosts", "small.txt"], 3, "needs"),
    ],
)
def test_refusals(words: list[str], code: int, message: str, place: Workspace) -> None:
    place.write("small.txt", f"{socket.gethostname()} slots=1 # memory=64GiB limit=1MiB\n")
    ended = run(place, *words, "run.dir=refused")
    assert ended.code == code
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_another_ones_files_are_left_alone(place: Workspace) -> None:
    place.write("some2/good/train.jsonl", jsonl([{"tokens": TRAIN[0]}]))
    place.write("taken/good/thesis.txt", "the work of years")
    ended = run(place, "--people", "some2", "run.dir=taken", "run.eval_every=null", "run.steps=1")
    assert ended.code == 65
    assert "mlx_empire did not write this" in ended.stdout.replace("\n", " ")
    assert (place.folder / "taken/good/thesis.txt").read_text() == "the work of years"
