"""The command as a user types it: shape of the JSON, verdicts and exit codes, and what stands on which stream."""

from __future__ import annotations

import json
import math
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_empire.capacity import answer
from mlx_empire.cluster import machine as measuring
from mlx_empire.cluster.machine import Calibration

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "tests" / "fixtures" / "tiny-llama-260k"
SCOUT, EMPIRE = ROOT / "recipes" / "scout.yaml", ROOT / "hosts" / "empire.txt"
CLUSTER = (
    "king slots=1 # role=king memory=512GiB",
    "soldier slots=1 # role=soldier memory=256GiB limit=208GiB",
)


def stored_parameters() -> int:
    """Elements of all tensors in the model's own file, by its header."""
    with (MODEL / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def limited(peak: int, part: float) -> str:
    """A hostfile's line of which `peak` bytes are `part` of the limit."""
    return f"box slots=1 # memory=1GiB limit={peak / part / 2**20:.6f}MiB"


def test_the_json_has_the_promised_shape(say, recipe, hosts):
    said = say(recipe, "--hosts", hosts(*CLUSTER), "--json", "memory.zero_stage=3", "memory.shares=[3,1]")
    assert (said.code, said.err) == (0, "")
    report = said.json
    assert report["model"]["parameters"] == stored_parameters()
    assert set(report["model"]) >= {"name", "parameters", "trainable_parameters", "active_parameters"}
    assert report["verdict"] == "fits"
    assert report["zero_stage"] == 3
    king, soldier = report["nodes"]
    assert (king["name"], king["role"], king["memory_bytes"], king["limit_bytes"]) == (
        "king",
        "king",
        512 * 2**30,
        464 * 2**30,
    )
    assert soldier["limit_bytes"] == 208 * 2**30
    assert king["share"] == pytest.approx(0.75, abs=0.01)
    for node in report["nodes"]:
        assert node["ledger"]["weights"] > 0
        assert sum(node["ledger"].values()) == node["peak_bytes"]
        assert node["headroom_bytes"] == node["limit_bytes"] - node["peak_bytes"]
        assert node["verdict"] == "fits"
        assert set(node["ledger"]) <= set(report["formulas"]), "each entry says how it was found"
    for key in ("step_seconds", "positions_per_second", "run_hours"):
        low, high = report["time"][key]
        assert 0 < low <= high
    assert report["time"]["bound"] in ("compute", "network", "optimizer", "disk")
    assert report["time"]["positions_per_second"][0] == pytest.approx(
        4 * 64 / report["time"]["step_seconds"][1]
    )
    assert report["time"]["run_hours"][1] == pytest.approx(3 * report["time"]["step_seconds"][1] / 3600)
    assert all(set(one) == {"change", "effect", "verdict"} for one in report["advice"])


@pytest.mark.parametrize(("part", "verdict", "code"), [(0.5, "fits", 0), (0.97, "tight", 0), (1.03, "no", 3)])
def test_the_limit_decides_verdict_and_exit_code(say, recipe, hosts, part, verdict, code):
    one = "batch.global_size=1"  # of several micro-batches some would pass after the others
    free = say(recipe, one, "--hosts", hosts("box slots=1 # memory=1GiB"), "--json").json
    said = say(recipe, one, "--hosts", hosts(limited(free["nodes"][0]["peak_bytes"], part)), "--json")
    assert said.code == code
    assert said.json["verdict"] == verdict
    (node,) = said.json["nodes"]
    assert node["verdict"] == verdict
    assert node["headroom_bytes"] / node["limit_bytes"] == pytest.approx(1 - part, abs=0.001)
    assert bool(said.json["reason"]) == (verdict != "fits")


def test_an_unknown_chip_has_memory_and_no_times(say, recipe, hosts, tmp_path):
    """Nothing of a machine's speed is made up: the same card was once priced as a CPU."""
    line, page, trace = "box slots=1 # memory=24GiB chip=", tmp_path / "page.html", tmp_path / "trace.json"
    unknown = hosts(line + "RTX-5099")
    why = "no time: unknown chip RTX-5099 of box: add it to plan/chips.toml of mlx_empire"
    said = say(recipe, "--hosts", unknown, "--json", "--html", page)
    report = said.json
    assert (said.code, report["verdict"]) == (0, "fits")
    assert (report["time"], report["times"]) == (None, [])
    assert report["no_time"].startswith(why)
    assert why in page.read_text()
    assert "H100" in report["cloud"]
    person = say(recipe, "--hosts", unknown).out
    assert why in person
    assert "positions/s" not in person
    assert all(
        one["step_seconds"] is None
        for one in say(recipe, "--hosts", unknown, "--daughters", "--json").json["training"]
    )
    assert "?" in say(recipe, "--hosts", unknown, "--daughters").out
    refused = say(recipe, "--hosts", unknown, "--trace", trace)
    assert (refused.code, trace.exists()) == (64, False)
    assert why in refused.err
    known = say(recipe, "--hosts", hosts(line + "RTX-3090"), "--json").json
    assert known["no_time"] is None
    assert 0 < known["time"]["run_hours"][0] < known["time"]["run_hours"][1] < 1


def test_without_a_hostfile_this_machine_is_meant(say, recipe):
    said = say(recipe, "--json")
    assert said.code == 0
    assert len(said.json["nodes"]) == 1
    assert 0 < said.json["nodes"][0]["limit_bytes"] <= said.json["nodes"][0]["memory_bytes"]


def test_slots_divide_this_machine(say, recipe, hosts):
    whole = say(recipe, "--json").json["nodes"][0]
    halves = say(recipe, "--hosts", hosts("localhost slots=2"), "--json").json["nodes"]
    assert [node["memory_bytes"] for node in halves] == [whole["memory_bytes"] // 2] * 2


def test_nothing_but_json_on_standard_output():
    command = [sys.executable, "-m", "mlx_empire.capacity", SCOUT, "--hosts", EMPIRE, "--json"]
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert report["model"]["parameters"] == 107_769_861_120  # mlx-lm's text model of the published checkpoint
    assert report["zero_stage"] == 3
    assert [node["role"] for node in report["nodes"]] == ["king", "soldier", "soldier", "soldier"]


def test_a_person_reads_every_node_with_its_figures(say, recipe, hosts):
    said = say(recipe, "--hosts", hosts(*CLUSTER))
    assert said.code == 0
    for words in (
        "king",
        "soldier",
        "464 GiB",
        "208 GiB",
        "verdict",
        "peak",
        "what to change",
        "positions/s",
    ):
        assert words in said.out
    assert "\x1b" not in said.out, "no colours where nobody watches"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("data.sequence_length=-5",), ("data.sequence_length", "-5")),
        (("model.path=nowhere",), ("model.path", "nowhere", "architecture")),
        (("model.path=nowhere", "model.architecture=lama-3.1-8b"), ("lama-3.1-8b", "llama-3.1-8b")),
        (("--hosts", "nowhere.txt"), ("nowhere.txt",)),
        (("--wire", "string"), ("string", "10gbe")),
        (("--matrix", "--ladder"), ("--matrix", "--ladder")),
        (("--compare", "x.csv"), ("--matrix",)),
        (("--mtrix",), ("--mtrix",)),
        (("--html", "/nowhere/x.html"), ("--html", "/nowhere/x.html")),
    ],
)
def test_bad_input_is_one_line_and_64(say, recipe, arguments, words):
    said = say(recipe, *arguments)
    assert (said.code, said.out) == (64, "")
    (line,) = said.err.splitlines()
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("option", "read"),
    [
        *(("--html", name) for name in ("recipe.yaml", "hosts.txt", "unit.json", "valid.jsonl", "table.csv")),
        *(("--trace", name) for name in ("recipe.yaml", "hosts.txt", "unit.json", "valid.jsonl")),
    ],
)
def test_no_file_that_is_read_is_written_over(say, recipe, hosts, tmp_path, option, read):
    hostfile, table, unit = hosts(*CLUSTER), tmp_path / "table.csv", tmp_path / "unit.json"
    table.write_text("model,1K+3S\n")
    for name in ("unit.json", "train.jsonl", "valid.jsonl"):
        (tmp_path / name).write_text("{}")
    before, other = (tmp_path / read).read_bytes(), tmp_path / "by another name"
    other.symlink_to(read)
    more = ["--matrix", "--compare", table] if read == "table.csv" else []
    said = say(recipe, "--hosts", hostfile, "--unit", unit, f"data.path={tmp_path}", *more, option, other)
    assert (said.code, said.out) == (64, "")
    assert said.err.startswith(f"mlx_empire: {option}: {other}: is read here, and is left as it is;")
    assert (tmp_path / read).read_bytes() == before


def test_a_hostfile_without_memory_is_one_line_and_64(say, recipe, hosts):
    said = say(recipe, "--hosts", hosts("king slots=1 # memory=512GiB", "far.example slots=1"), "--json")
    assert (said.code, said.out) == (64, "")
    (line,) = said.err.splitlines()
    assert "hosts.txt:2: far.example" in line
    assert "memory=" in line


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "no-such-family"}', '{"model_type": "llama"}'])
def test_a_damaged_config_is_one_line_and_64(say, recipe, tmp_path, text):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(text)
    said = say(recipe, f"model.path={folder}")
    assert (said.code, said.out) == (64, "")
    (line,) = said.err.splitlines()
    assert str(folder) in line


def test_a_head_that_the_folder_stores_is_counted_as_the_run_counts_it(say, recipe, tmp_path):
    """The configuration does not say whether the head is tied, and the folder has one."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    weights = mx.load(str(folder / "model.safetensors"))
    weights["lm_head.weight"] = mx.array(weights["model.embed_tokens.weight"])
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    said = say(recipe, f"model.path={folder}", "--json").json
    assert said["model"]["parameters"] == sum(array.size for array in weights.values()) > stored_parameters()


def test_the_disk_of_a_machine_decides_too(say, recipe, hosts):
    """What the hostfile says is free counts; without checkpoints there is less to keep."""
    asked = ["run.save_every=1", "run.keep_last=1", "--json", "--hosts"]

    def report(disk: str, *more: str):
        said = say(recipe, *more, *asked, hosts(f"box slots=1 # memory=1GiB{disk}"))
        return said.code, said.json

    code, unknown = report("")
    (disk,) = unknown["disks"]
    assert (code, unknown["verdict"], disk["verdict"], disk["free_bytes"]) == (0, "fits", None, None)
    weights = 4 * stored_parameters()
    assert disk["result_bytes"] - weights == pytest.approx(0, abs=100_000)
    assert disk["checkpoint_bytes"] == pytest.approx(3 * weights, rel=0.05)
    assert disk["least_bytes"] >= 2 * disk["checkpoint_bytes"]
    for free, verdict, code in (
        (disk["least_bytes"] - 2**17, "no", 3),
        (disk["asked_bytes"] + 2**17, "fits", 0),
    ):
        ended, found = report(f" disk={free / 2**20:.6f}MiB")
        assert (ended, found["verdict"], found["disks"][0]["verdict"]) == (code, verdict, verdict)
        assert ("the disk of box needs" in found["reason"]) == (verdict == "no")
        assert any("of box" in advice["change"] for advice in found["advice"]) == (verdict == "no")
    first, *_ = report(f" disk={(disk['least_bytes'] - 2**17) / 2**20:.6f}MiB")[1]["advice"]
    assert (
        report(f" disk={(disk['least_bytes'] - 2**17) / 2**20:.6f}MiB", *first["change"].split(" "))[0] == 0
    )


def test_a_calibration_takes_the_place_of_the_planned_figures(say, recipe, hosts, monkeypatch):
    asked = []

    def measured(dtype):
        asked.append(dtype)
        return Calibration("here", None, dtype, 50.0, 2e9)

    monkeypatch.setattr(answer, "calibrate", measured)
    box = hosts("box slots=1 # memory=1GiB chip=CPU")
    planned = say(recipe, "--hosts", box, "--json").json
    found = say(recipe, "--hosts", box, "--json", "--calibrate").json
    assert asked == ["float32"]
    assert "45 to 55 TFLOP/s executed (measured: calibration on here)" in found["notes"][0]
    assert "here" not in planned["notes"][0]
    slow, fast = (one["time"]["positions_per_second"][0] for one in (planned, found))
    assert fast > 2 * slow
    say(recipe, "--hosts", box, "--json", "--calibrate", "--daughters")
    assert len(asked) == 2


def test_the_calibration_measures_this_machine(say, recipe, monkeypatch):
    monkeypatch.setattr(measuring, "LONG_ENOUGH", 0.0)
    monkeypatch.setattr(measuring, "COPY_ELEMENTS", 1 << 16)
    found = say(recipe, "--json", "--calibrate").json
    assert f"measured: calibration on {socket.gethostname()}" in found["notes"][0]
    low, high = found["time"]["positions_per_second"]
    assert 0 < low <= high


@pytest.mark.slow
def test_an_untouched_mac_stands_beside_the_raised_limit(say):
    """Scout on the empire: the plan assumes 464 GiB of 512, and a king that nobody touched lends 384."""
    said = say(SCOUT, "--hosts", EMPIRE, "--json")
    assert said.json["untouched_macos"]["verdict"] in ("fits", "tight", "no")
    assert said.json["untouched_macos"]["commands"] == [
        {"name": "king.local", "command": "sudo sysctl iogpu.wired_limit_mb=475136"}
    ]
    king = said.json["nodes"][0]
    assert 384 * 2**30 < king["peak_bytes"] <= king["limit_bytes"] == 464 * 2**30
    words = " ".join(say(SCOUT, "--hosts", EMPIRE).out.split())
    assert "on king.local `sudo sysctl iogpu.wired_limit_mb=475136` first; macOS forgets" in words


def test_where_no_limit_is_assumed_nothing_is_said_of_macos(say, recipe, hosts):
    said = say(recipe, "--hosts", hosts("box slots=1 # memory=1GiB chip=CPU"), "--json")
    assert said.json["untouched_macos"] == {"verdict": None, "commands": []}
