"""Matrix, ladder, daughters and the page with all of them, through the command, over two models of the catalog."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_empire.model import catalog
from mlx_empire.plan.hardware import standard_clusters

ROOT = Path(__file__).resolve().parents[2]
SCOUT = ROOT / "recipes" / "scout.yaml"
EMPIRE = ("--hosts", ROOT / "hosts" / "empire.txt")
NAMES = ("llama-3.2-1b", "phi-3-mini-3.8b")  # the second: rows longer than a window that its module lacks
CLUSTERS = ["1K+3S", "2K+2S", "3K+1S", "4K"]


@pytest.fixture(autouse=True)
def small_catalog(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = catalog.names()
    assert set(NAMES) < set(everything)
    monkeypatch.setattr(catalog, "names", lambda: NAMES)


def test_the_matrix_has_the_promised_shape(say):
    said = say(SCOUT, "--matrix", "--json")
    assert (said.code, said.err) == (0, "")
    matrix = said.json
    assert matrix["clusters"] == CLUSTERS == list(standard_clusters())
    assert [row["model"] for row in matrix["rows"]] == list(NAMES)
    llama, windowed = matrix["rows"]
    assert llama["parameters"] == 1_235_814_400  # published: model card of Llama 3.2 1B
    assert "sliding window of 2047" in windowed["not_trainable"]
    assert llama["not_trainable"] is None
    for cluster in CLUSTERS:
        cell = llama["cells"][cluster]
        assert set(cell) >= {"verdict", "zero_stage", "headroom"}
        assert cell["verdict"] == "fits"
        assert 0.9 < cell["headroom"] < 1


def test_the_matrix_of_a_hostfile_is_of_those_machines(say, tmp_path):
    small = tmp_path / "attic.txt"
    small.write_text("box slots=1 # memory=8GiB\n")
    whole, own = (
        say(SCOUT, "--matrix", "--json").json,
        say(SCOUT, "--matrix", "--json", "--hosts", small).json,
    )
    assert own["clusters"] == ["attic"]
    (cell,) = own["rows"][1]["cells"].values()
    assert (cell["verdict"], cell["worst_node"]) == ("no", "box")
    assert own["pooled_bytes"] == {"attic": 8 * 2**30}
    assert {cell["verdict"] for cell in whole["rows"][1]["cells"].values()} == {"fits"}


def test_a_comparison_names_what_differs(say, tmp_path):
    file = tmp_path / "their.csv"
    file.write_text("model,parameters,1K+3S,4K\nLlama 3.2 1B,1B,NO,YES\nUnheard Of,1B,YES,YES\n")
    matrix = say(SCOUT, "--matrix", "--compare", file, "--json").json
    (difference,) = matrix["differences"]
    assert (difference["model"], difference["cluster"]) == ("llama-3.2-1b", "1K+3S")
    assert (difference["file_says"], difference["verdict"]) == ("NO", "fits")
    assert matrix["unknown"] == ["Unheard Of"]
    assert matrix["same"] == 1


def test_a_damaged_comparison_is_one_line_and_64(say, tmp_path):
    file = tmp_path / "their.csv"
    file.write_text("model,4K\nllama,PERHAPS\n")
    said = say(SCOUT, "--matrix", "--compare", file)
    assert (said.code, said.out) == (64, "")
    (line,) = said.err.splitlines()
    assert f"{file}:2" in line


def test_each_rung_of_the_ladder_needs_no_more_than_the_one_below(say):
    ladder = say(
        SCOUT, *EMPIRE, "model.architecture=llama-3.2-1b", "memory.shares=[3,1,1,1]", "--ladder", "--json"
    ).json
    worst = [max(node["peak_bytes"] for node in rung["nodes"]) for rung in ladder["rungs"]]
    assert len(worst) >= 8
    assert worst[0] > 3 * worst[-1]
    assert all(set(rung) >= {"name", "verdict", "nodes", "dense", "moe"} for rung in ladder["rungs"])
    assert ladder["rungs"][-2]["dense"]["model"] == "llama-3.2-1b"


def test_daughters_are_trained_served_and_placed(say):
    said = say(SCOUT, *EMPIRE, "model.architecture=llama-3.2-1b", "--daughters", "--count", 5, "--json")
    daughters = said.json
    assert {run["node"] for run in daughters["training"]} == {"king.local", "soldier-1.local"}
    lora, quantised = (
        next(r for r in daughters["training"] if way in r["way"]) for way in ("LoRA,", "4-bit")
    )
    assert quantised["peak_bytes"] < lora["peak_bytes"]
    for placement in daughters["placements"]:
        homes = [name for node in placement["nodes"] for name in node["models"]]
        assert sorted(homes + placement["homeless"]) == ["1", "2", "3", "4", "5"]
        assert all(node["used_bytes"] <= node["limit_bytes"] for node in placement["nodes"])


def test_the_page_shows_them_all(say, tmp_path):
    page = tmp_path / "page.html"
    said = say(SCOUT, *EMPIRE, "model.architecture=llama-3.2-1b", "--html", page, "--json")
    assert said.code == 0
    assert said.json["verdict"] == "fits"
    text = page.read_text()
    for words in (
        "1,235,814,400",
        "soldier-3.local",
        "The ladder",
        "phi-3-mini-3.8b",
        "4K",
        "a daughter of",
        "The ledger",
    ):
        assert words in text


@pytest.mark.parametrize("count", [0, -1, 10**9])
def test_an_impossible_count_is_one_line_and_64(say, count):
    said = say(SCOUT, "--daughters", f"--count={count}")
    assert (said.code, said.out) == (64, "")
    assert str(count) in said.err
