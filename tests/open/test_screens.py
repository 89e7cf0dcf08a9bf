"""The screens in a real browser: legible in light and dark at both widths, alive, and asking nobody else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from capacity import made_up
from support.browser import ENOUGH, MEASURE, needs_browser
from support.devtools import Browser, Page
from support.run_folders import HOSTILE, evaluation, lines, made_run, records, step
from support.served import Server, served

from mlx_empire.capacity.page import capacity_page
from mlx_empire.evaluate.document import Scored, changed_document
from mlx_empire.evaluate.page import evaluation_page
from mlx_empire.report.metrics import read_metrics
from mlx_empire.verify.fidelity import Finding, Outcome, Pair
from mlx_empire.verify.page import FidelityReport, fidelity_page

pytestmark = needs_browser
ROOT = Path(__file__).resolve().parents[2]
SCREENS = {
    "runs": "/",
    "run": "/run/scout",
    "hostile": f"/run/{quote(HOSTILE)}",
    "people": "/people",
    "compare": "/compare?run=scout&run=slow",
}
EVERY = [(name, width, dark) for name in SCREENS for width in (1280, 390) for dark in (False, True)]
FEW = [("hostile", 390, True)]
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
X = "[...document.querySelector('.plot').data.find(one => one.name === 'training').x]"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home") / "runs"
    made_run(folder / "scout", 30, cause="was killed by SIGKILL", log="a line\n")
    made_run(folder / "slow", 40, rate="1.0e-6", complete=True)
    made_run(folder / "people" / "alice", 20, data="people/alice", tuning="lora", complete=True)
    made_run(
        folder / HOSTILE, hosts=(HOSTILE, "a-machine-with-a-very-long-name.local"), data=HOSTILE, cause=HOSTILE,
        log=f"{HOSTILE} {'long ' * 60}\n",
    )  # fmt: skip
    with (folder / HOSTILE / "metrics.jsonl").open("a") as file:
        file.write(lines([evaluation(30, HOSTILE), evaluation(31, HOSTILE)]) + '{"step": 31, "lo')
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    with served(root) as found:
        yield found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


def ready(page: Page, charts: bool = True) -> None:
    """The page is there, and its charts are drawn."""
    page.until("document.readyState === 'complete'")
    if charts:
        page.until("document.querySelectorAll('.plot svg').length > 0")


def check(browser: Browser, server: Server, name: str, width: int, dark: bool) -> None:
    with browser.page(server.base + SCREENS[name], width=width, dark=dark) as page:
        ready(page, name in ("run", "hostile", "compare"))
        assert page.value(OVERFLOW) <= 0
        found = measured(page)
        assert (found["ground"] < 0.05) == dark
        assert len(found["texts"]) > 10
        assert [text for text in found["texts"] if text["contrast"] < ENOUGH] == []
        assert found["images"] == 0, "nothing hostile became an element"
        assert page.complaints == []
        assert {url.split("/", 3)[2] for url in page.requests if not url.startswith("data:")} == {
            server.base[7:]
        }


def measured(page: Page) -> dict[str, Any]:
    """What `support.browser` measures of a page."""
    page.value(
        MEASURE.replace("SELECTORS", "[]").replace("<script>", "(() => {").replace("</script>", "})()")
    )
    return dict(json.loads(page.value("document.getElementById('measured').textContent")))


@pytest.mark.parametrize(("name", "width", "dark"), FEW)
def test_a_run_is_legible_whatever_its_names_say(
    browser: Browser, server: Server, name: str, width: int, dark: bool
) -> None:
    check(browser, server, name, width, dark)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "width", "dark"), [one for one in EVERY if one not in FEW])
def test_every_screen_is_legible_at_both_widths_in_light_and_dark(
    browser: Browser, server: Server, name: str, width: int, dark: bool
) -> None:
    check(browser, server, name, width, dark)


def test_an_open_page_follows_a_run_that_goes_on_is_killed_and_goes_back(
    browser: Browser, server: Server, root: Path
) -> None:
    folder = made_run(root / "alive", 20)
    with browser.page(f"{server.base}/run/alive") as page:
        ready(page)
        assert page.value(X) == list(range(1, 21))
        drawn = page.value("[...document.querySelector('.plot').data.find(one => one.name === 'training').y]")
        assert drawn == pytest.approx([step(n)["loss"] for n in range(1, 21)], rel=1e-5)
        page.value("window.mine = 1")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(lines([step(21)]))
        assert page.until(f"{X}.length === 21 && {X}")[-1] == 21
        assert "21 of 100" in page.until("document.getElementById('panel-head').innerText")
        (folder / "metrics.jsonl").write_text(
            lines(records(1, 10))
        )  # it goes on from the checkpoint of step 10
        assert page.until(f"{X}.length === 10 && {X}") == list(range(1, 11))
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(lines([step(11), step(12)]))
        assert page.until(f"{X}.length === 12 && {X}") == list(range(1, 13))
        assert page.value("window.mine") == 1, "without a reload"
        assert page.complaints == []


@pytest.mark.slow
def test_a_real_run_is_killed_and_resumed_behind_the_open_page(browser: Browser, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    root.mkdir()
    words = ["run.steps=200", "run.save_every=5", "run.eval_every=50", "report.samples=2"]
    command = [
        sys.executable,
        "-m",
        "mlx_empire.train",
        "recipes/tiny.yaml",
        *words,
        f"run.dir={root / 'real'}",
    ]
    environment = os.environ | {"MLX_EMPIRE_CACHE": str(tmp_path / "cache")}
    run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        while not (root / "real" / "checkpoints" / "step-000010" / "COMMIT").exists():
            assert run.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        with served(root) as server, browser.page(f"{server.base}/run/real") as page:
            ready(page)
            page.value("window.mine = 1")
            page.until(f"{X}.length > 10")
            run.kill()
            run.wait()
            written = [record["step"] for record in read_metrics(root / "real") if "loss" in record]
            assert page.until(f"{X}.length === {len(written)} && {X}") == written
            page.until("!document.getElementById('panel-head').innerText.includes('running')")
            subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
            assert page.until(f"{X}.length === 200 && {X}") == list(range(1, 201))
            page.until("document.getElementById('panel-head').innerText.includes('complete')")
            page.until("document.getElementById('panel-samples').innerText.includes('The model writes')")
            assert page.value("window.mine") == 1, "without a reload"
            assert page.complaints == []
    finally:
        run.kill()
        run.wait()
    assert (root / "real" / "report.html").stat().st_size <= 2_000_000


@pytest.mark.slow
def test_the_list_is_sorted_by_a_click_and_keeps_its_ticks_while_runs_go_on(
    browser: Browser, server: Server, root: Path
) -> None:
    names = "[...document.querySelectorAll('tbody tr')].map(row => row.dataset.run)"
    with browser.page(server.base) as page:
        ready(page, charts=False)
        page.until("document.getElementById('live').textContent === 'live'")
        steps = "[...document.querySelectorAll('td[data-name=step]')].map(cell => +cell.dataset.sort)"
        page.value(
            "[...document.querySelectorAll('th button')].find(one => one.innerText === 'step').click()"
        )
        assert page.value(steps) == sorted(page.value(steps))
        page.value(
            "[...document.querySelectorAll('th button')].find(one => one.innerText.startsWith('step')).click()"
        )
        assert page.value(steps) == sorted(page.value(steps), reverse=True)
        page.value("document.querySelector('input[value=scout]').click()")
        page.value("document.querySelector('input[value=slow]').click()")
        with (root / "scout" / "metrics.jsonl").open("a") as file:
            file.write(lines(records(31, 45)))
        page.until(
            "document.querySelector('tr[data-run=scout] td[data-name=step]').innerText === '45 of 100'"
        )
        assert page.value(names)[0] == "scout", "45 steps are the most"
        page.value("document.querySelector('button.action').click()")
        ready(page)
        assert "optimizer.learning_rate" in page.value("document.body.innerText")


@pytest.mark.slow
def test_the_saved_page_is_legible_too(browser: Browser, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.html"
    command = [sys.executable, "-m", "mlx_empire", "open", str(root / HOSTILE), "--save", str(out)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONWARNINGS": "error"})
    for width, dark in ((1280, False), (390, True)):
        with browser.page(out.as_uri(), width=width, dark=dark) as page:
            ready(page, charts=False)
            assert page.value(OVERFLOW) <= 0
            found = measured(page)
            assert [text for text in found["texts"] if text["contrast"] < ENOUGH] == []
            assert len(page.requests) == 1 + sum(url.startswith("data:") for url in page.requests)
            assert page.value("document.querySelectorAll('.chart svg polyline').length") >= 7
            assert page.complaints == []


def fidelity() -> str:
    """The page of an audit in which one seed of two lost its numbers."""
    plain = tuple(Outcome((3.0 + seed, 2.0, 1.0), 1.0, "a") for seed in range(2))
    tried = (
        replace(plain[0], losses=(3.0, 2.002, 1.0), digest="b"),
        replace(plain[1], losses=(4.0, nan, 1.0)),
    )
    findings = [Finding(Pair(HOSTILE, {}, True), plain, tried), Finding(Pair("same", {}, True), plain, plain)]
    return fidelity_page(FidelityReport(HOSTILE, "made up", findings, {HOSTILE: 2**30}))


def capacity() -> str:
    """The capacity page with every case that it must show."""
    surveys = made_up.matrix(), made_up.ladder(), made_up.daughters()
    return capacity_page(made_up.report(), *surveys, HOSTILE)


def graded() -> str:
    """The page of an evaluation of answers from sources, in both columns, beside another, with long words."""

    def scored(name: str, right: float) -> Scored:
        wrong = {"question": f"q {HOSTILE}", "expected": None, "said": "a" * 90, "refused": False}
        row = {**wrong, "unanswerable": True, "values": {"json_schema": right, "false_confidence": 1.0}}
        sets = ("answers", "answers.constrained")
        return Scored(name, {f"{one}.json_schema": right for one in sets}, {one: [row] * 3 for one in sets})

    return evaluation_page(changed_document([scored(HOSTILE, 1.0), scored("b", 0.0)]))


@pytest.mark.slow
@pytest.mark.parametrize("make", [capacity, fidelity, graded])
@pytest.mark.parametrize(
    ("width", "dark", "media"), [(1280, True, ""), (390, False, ""), (390, True, ""), (800, False, "print")]
)
def test_pages_without_a_run_are_legible_on_a_phone_and_on_paper_too(
    browser: Browser, tmp_path: Path, make: Callable[[], str], width: int, dark: bool, media: str
) -> None:
    (tmp_path / "page.html").write_text(make())
    with browser.page((tmp_path / "page.html").as_uri(), width=width, dark=dark) as page:
        ready(page, charts=False)
        if media:
            page.ask("Emulation.setEmulatedMedia", media=media)
        found = measured(page)  # opens what is folded
        assert found["overflow"] <= 0
        assert len(found["texts"]) > 15
        assert [text for text in found["texts"] if text["contrast"] < ENOUGH] == []
        assert found["images"] == 0
        assert page.complaints == []
        assert len(page.requests) == 1 + sum(url.startswith("data:") for url in page.requests)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "most"), [(1280, 2800), (390, 4000)])
def test_a_report_on_what_fits_is_short_until_something_is_unfolded(
    browser: Browser, tmp_path: Path, width: int, most: int
) -> None:
    (tmp_path / "page.html").write_text(capacity_page(*made_up.fitting(), "mlx-empire capacity scout.yaml"))
    rows = "[...document.querySelectorAll('.heat tbody tr')].map(row => row.getBoundingClientRect().height)"
    with browser.page((tmp_path / "page.html").as_uri(), width=width) as page:
        ready(page, charts=False)
        assert page.value("document.querySelectorAll('details[open]').length") == 1, "a step, as it is drawn"
        assert page.value("document.documentElement.scrollHeight") < most
        assert page.value(OVERFLOW) <= 0
        page.value("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        assert page.value("document.documentElement.scrollHeight") > most
        assert len(found := page.value(rows)) == 35
        assert max(found) <= 27, "a dense heat map"


@pytest.mark.slow
def test_a_click_copies_the_whole_command_with_and_without_a_clipboard(
    browser: Browser, tmp_path: Path
) -> None:
    (tmp_path / "page.html").write_text(capacity())
    wanted = f"{HOSTILE} memory.shares=memory"
    click = (
        f"[...document.querySelectorAll('.typed')].find(one => one.innerText.includes({json.dumps(wanted)}))"
    )
    with browser.page((tmp_path / "page.html").as_uri()) as page:
        ready(page, charts=False)
        page.value(
            "Object.defineProperty(navigator, 'clipboard', {configurable: true, value: {writeText: async text => {"
            " window.got = text; }}})"
        )
        page.value(f"{click}.querySelector('button').click()")
        assert page.until("window.got") == wanted
        assert page.until(f"{click}.querySelector('button').innerText === 'copied'")
        page.value("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
        page.value("getSelection().removeAllRanges()")
        page.value(f"{click}.querySelector('button').click()")
        assert page.value("getSelection().toString()") == wanted, (
            "to be copied by hand, whatever the browser allows"
        )
        assert page.complaints == []


@pytest.mark.slow
def test_a_run_on_paper_has_its_charts_and_none_of_the_buttons(browser: Browser, server: Server) -> None:
    with browser.page(f"{server.base}/run/scout", width=800) as page:
        ready(page)
        page.ask("Emulation.setEmulatedMedia", media="print")
        assert page.value("getComputedStyle(document.querySelector('nav')).display") == "none"
        assert page.value("document.querySelectorAll('.plot svg').length") > 0
        assert page.value(OVERFLOW) <= 0
