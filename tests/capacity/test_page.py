"""The page as a reader gets it: one file, nothing hostile in it, short until something is unfolded, and legible in a
real browser, light and dark."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from html import unescape
from typing import Any

import pytest
from capacity import made_up
from support import browser
from support.browser import ENOUGH, needs_browser
from support.outline import Outline

from mlx_empire.capacity import command
from mlx_empire.capacity.document import CapacityReport
from mlx_empire.capacity.heat_map import HERE, matrix_section
from mlx_empire.capacity.page import capacity_page
from mlx_empire.capacity.survey_document import MatrixSurvey
from mlx_empire.capacity.whatif import Advice

ENOUGH_FOR_PICTURES = 1.9  # contrast of parts of a bar against the card (they are labelled too)


def page_of(report: CapacityReport, made_by: str = f"capacity {made_up.HOSTILE}") -> str:
    return capacity_page(report, made_up.matrix(), made_up.ladder(), made_up.daughters(), made_by)


@pytest.fixture(scope="module")
def page() -> str:
    return page_of(made_up.report())


def commands_of(page: str) -> list[str]:
    """The commands that have a button."""
    found = re.findall(
        r'<div class="typed"><code>([^<]*)</code><button [^>]*hidden>copy</button></div>', page
    )
    return [unescape(one) for one in found]


@pytest.fixture(scope="module", params=[False, True], ids=["light", "dark"])
def measured(page: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    found = browser.measure(page, tmp_path_factory.mktemp("browser"), dark=request.param)
    return found | {"dark": request.param}


def test_one_well_formed_file_that_fetches_nothing_and_runs_only_what_copies(page):
    outline = Outline(page)
    assert outline.open == []
    assert outline.suspicious == []
    assert not outline.tags & {"img", "iframe", "object", "form"}
    assert page.count("<script") == 1
    assert (HERE / "copy.html").read_text().strip() in page, "whatever names say"
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", page)


def test_it_says_what_the_report_and_the_surveys_say(page):
    outline = Outline(page)
    text = outline.text
    for words in (
        "does not fit",
        "107,769,861,120",
        "17,172,894,720",
        "352 GiB of 464 GiB",
        "22.0 GiB too much",
        "memory.shares=memory",
        "10 GbE",
        "network",
        "140% over · Z3",
        "memory: fits",
        "llama-2-13b",
        "242",
        "A step over 10 GbE: 100 s at best",
        made_up.HOSTILE,
    ):
        assert words in text, words


def test_what_fits_is_folded_and_what_is_short_is_not(page):
    outline = Outline(page)
    text, seen = outline.text, outline.seen_text
    for words in (
        "the worst moment of a chunk's loss",  # the ledger of what does not fit
        "✓ king: 4 entries, 352 GiB of 464 GiB, 112 GiB free",
        "token cache",  # a disk is short
        "3 rungs: it fits first with “another”",
        "Over other wires: TCP over Thunderbolt",
        "Training a daughter of scout on one machine: 1 fit",
    ):
        assert words in seen, words
    for words in ("scores alive", "pure", "56.0 GiB"):
        assert words not in seen, words
    for words in ("scores alive", "pure", "56.0 GiB"):
        assert words in text, words
    disk = made_up.report().disks[0]
    shown = Outline(page_of(replace(made_up.report(), disks=(disk,)))).seen_text
    assert "token cache" not in shown
    assert re.search(r"At most [\d,.]+ GiB, on .*: it fits", shown)


def test_machines_that_are_alike_are_drawn_once():
    king, soldier = (
        made_up.node("king", "king", 512, 464, "fits", weights=100),
        made_up.node("soldier-1", "soldier", 256, 208, "fits", weights=60, attention=5),
    )
    nodes = [
        king,
        soldier,
        *(replace(soldier, node=replace(soldier.node, name=f"soldier-{i}")) for i in (2, 3)),
    ]
    report = replace(made_up.report(), assessment=made_up.assessed(*nodes), disks=())
    alike = page_of(report)
    assert alike.count('<div class="node">') == 2
    text = Outline(alike).text
    assert "soldier-1 +2 soldier · 256 GiB · share 25.0% each and soldier-2, soldier-3" in text
    assert text.count("soldier-2") == 1
    assert text.count("✓ soldier-1 +2: 2 entries, 65.0 GiB of 208 GiB, 143 GiB free") == 1


def test_a_change_that_can_be_typed_comes_with_the_whole_command():
    raising = "sudo sysctl iogpu.wired_limit_mb=475136"
    advice = (
        Advice("memory.shares=memory optimizer.state_bits=8", "soldiers need 2 x 3 GiB", "fits"),
        Advice(f"{raising} on king (in the hostfile limit=464GiB)", made_up.HOSTILE, "tight"),
        Advice(f"another {made_up.HOSTILE}", "2,000 dollars", "fits"),
        Advice(f"run.steps={made_up.HOSTILE}", "a name is no setting", "fits"),
        Advice("batch.micro_size=2", "is folded", "fits"),
    )
    made_by = "mlx-empire capacity recipes/scout.yaml --hosts hosts/empire.txt --html my.html run.steps=5"
    page = page_of(replace(made_up.report(), advice=advice), made_by)
    typed = commands_of(page)
    changed = f"{made_by} memory.shares=memory optimizer.state_bits=8"
    assert typed == ["mlx-empire open runs/test", changed, raising, f"{made_by} batch.micro_size=2"]
    words = command.read(shlex.split(changed)[2:])
    assert words.overrides == ["run.steps=5", "memory.shares=memory", "optimizer.state_bits=8"]
    assert "2 more" in Outline(page).seen_text
    assert "is folded" not in Outline(page).seen_text


def test_figures_are_multiplied_by_one_sign(page):
    text = Outline(page).text
    assert re.findall(r"[\d%] x ", text) == []
    assert "8 × H100" in text
    assert "8 × 2,048 positions a step" in text
    assert made_up.HOSTILE in text, "a name's x stays"


@needs_browser
def test_the_ground_follows_the_readers_system(measured):
    assert (measured["ground"] < 0.05) == measured["dark"]
    assert (measured["ground"] > 0.85) == (not measured["dark"])


@needs_browser
def test_every_text_stands_out(measured):
    assert len(measured["texts"]) > 100
    faint = [t for t in measured["texts"] if t["contrast"] < ENOUGH]
    assert not faint


@needs_browser
def test_bars_are_as_long_as_the_memory_that_they_show(measured):
    nodes = made_up.report().nodes
    assert len(measured["bars"]) == len(nodes)
    scale = 512 * 2**30  # the longest box
    for bar, node in zip(measured["bars"], nodes, strict=True):
        length = bar["width"] / scale
        assert bar["machine"]["width"] == pytest.approx(node.node.memory_bytes * length, abs=1)
        assert bar["limit"]["left"] == pytest.approx(node.limit_bytes * length, abs=1)
        parts = sorted(part["width"] for part in bar["parts"])
        assert parts == pytest.approx(sorted(size * length for size in node.ledger.items().values()), abs=1)
        end = 0.0
        for part in bar["parts"]:
            assert part["left"] == pytest.approx(end, abs=1), "parts stand side by side"
            end = part["left"] + part["width"]
            assert part["height"] > 10
            assert part["contrast"] > ENOUGH_FOR_PICTURES, part["title"]
        over = max(-node.headroom_bytes, 0)
        assert sum(o["width"] for o in bar["over"]) == pytest.approx(over * length, abs=1)
        assert node.node.name in bar["label"]


@needs_browser
def test_the_heat_map_shades_by_verdict_and_room(measured):
    no, tight, some, much = (cell["shade"] for cell in measured["cells"][:4])

    def reddest(shade: list[float]) -> bool:
        return shade[0] > shade[1] and shade[0] > shade[2]

    def greenest(shade: list[float]) -> bool:
        return shade[1] > shade[0] and shade[1] > shade[2]

    assert reddest(no)
    assert reddest(tight)
    assert tight[1] > no[1], "amber is not red"
    assert greenest(some)
    assert greenest(much)
    assert much[1] - much[0] > some[1] - some[0], "more room, more colour"
    grey = measured["cells"][6]["shade"]
    assert max(grey) - min(grey) < 25, "not trainable is neither green nor red"


@needs_browser
def test_nothing_hostile_became_an_element(measured):
    assert measured["images"] == 0


@needs_browser
@pytest.mark.parametrize("width", [1200, 500])
def test_nothing_sticks_out_sideways(page, tmp_path, width):
    assert browser.measure(page, tmp_path, dark=False, width=width)["overflow"] <= 0


@needs_browser
def test_a_bar_of_the_ladder_that_is_cut_off_is_seen_to_be(page, tmp_path):
    nodes = [node for rung in made_up.ladder().rungs for node in rung.assessment.nodes]
    most = 3 * max(node.limit_bytes for node in nodes)
    found = browser.measure(page, tmp_path, dark=False)["thin"]
    assert [one["torn"] for one in found] == [node.peak_bytes > most for node in nodes]
    assert {one["torn"] for one in found} == {True, False}


def test_on_one_cluster_every_model_is_shown_and_nothing_is_said_of_others():
    survey = made_up.matrix()
    name = survey.matrix.clusters[2]
    row = replace(survey.matrix.rows[0], cells={name: survey.matrix.rows[0].cells[name]})
    shown = matrix_section(MatrixSurvey(replace(survey.matrix, clusters=(name,), rows=(row,)), None))
    assert "<details>" not in shown
    assert "everywhere" not in shown.lower()
    assert f"Every model on {name}" in shown
    assert row.model in Outline(shown).text


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        (["network"], "A step is bound by network."),
        (["network", "network"], "Each is bound by network."),
        (["network", "compute"], None),
    ],
)
def test_what_bounds_a_step_is_said_however_many_wires_there_are(bounds, said):
    paces = [made_up.pace(wire, bound, 1.0) for wire, bound in zip(("10gbe", "cable"), bounds, strict=False)]
    text = Outline(page_of(replace(made_up.report(), paces=tuple(paces)))).text
    assert ("bound by" in text.replace(said or "", "")) == (said is None), "once, or a column"
    assert said is None or said in text


def test_models_that_are_alike_everywhere_are_folded(page):
    telling = made_up.matrix()
    row = replace(telling.matrix.rows[0], model="everywhere")
    cells = {name: replace(cell, verdict="fits", pooled_says="fits") for name, cell in row.cells.items()}
    rows = (*telling.matrix.rows, replace(row, cells=cells))
    shown = matrix_section(replace(telling, matrix=replace(telling.matrix, rows=rows)))
    before, folded = shown.split("<details>", 1)
    assert "1 fit everywhere" in folded
    assert "everywhere" not in before
    assert all(one.model in unescape(before) for one in telling.matrix.rows)
