"""The screens in a real browser: legible in light and dark at both widths, alive, and asking nobody else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from support.browser import ENOUGH, MEASURE, needs_browser
from support.devtools import Browser, Page
from support.run_folders import HOSTILE, evaluation, lines, made_run, records, step
from support.served import Server, served

pytestmark = needs_browser
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
