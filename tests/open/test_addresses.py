"""The page's server: what each address answers, who may look, and that it leaves the run alone."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from starlette.requests import Request
from support.run_folders import HOSTILE, made_long, made_run
from support.saying import said
from support.served import Server, served

from mlx_empire.open.app import Pages
from mlx_empire.open.serve import root_of
from mlx_empire.page.live import RunFeed
from mlx_empire.page.series import Series
from mlx_empire.page.watch import Gallery, Look
from mlx_empire.run.lock import RUN, RunLock

MOST_BYTES = 2_000_000


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home") / "runs"
    made_run(folder / "scout", 30)
    made_run(folder / "slow", 40, rate="1.0e-6", complete=True)
    made_run(folder / "people" / "alice", 20, data="people/alice", tuning="lora", complete=True)
    made_run(folder / "people" / HOSTILE, 10, data=f"people/{HOSTILE}", tuning="lora")
    made_run(folder / "adapter", 10, tuning="lora")  # nobody's daughter
    made_run(folder.parent / "outside")
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    with served(root) as found:
        yield found


def test_every_screen_answers_and_says_what_it_is_about(server: Server) -> None:
    for path, words in (
        ("/", ["scout", "slow", "people/alice", "40 of 100", "complete"]),
        ("/run/scout", ["30 of 100", "soldier-1", "optimizer.learning_rate"]),
        ("/run/people/alice", ["20 of 100"]),
        ("/people", ["alice", "1 complete, 1 not finished", "2.1000"]),
        (
            "/compare?run=scout&run=slow",
            [
                "learning_rate",
                "1e-05",
                "1e-06",
                "best held-out loss",
                "scout, after step 30",
                "slow, after step 40",
            ],
        ),
    ):
        answer = server.get(path)
        assert answer.status == 200, path
        for word in words:
            assert word in answer.body, (path, word)
        assert "<img" not in answer.body
    assert "run.steps" not in server.get("/compare?run=scout&run=slow").body, "only what differs"


def test_what_is_not_there_is_told_without_leaving_the_folder(server: Server) -> None:
    for path in (
        "/run/../outside",
        "/run/..%2foutside",
        "/run/%2e%2e/outside",
        "/run/people",
        "/run/nobody",
        "/static/no",
    ):
        assert server.get(path).status == 404, path
        assert "30 of 100" not in server.get(path).body
    assert server.get("/events/run/nobody").status == 404
    assert server.get("/compare?run=scout").status == 400
    assert server.get("/run/%3Cimg%20src=x%3E").body.count("<img") == 0


def test_a_run_that_cannot_be_read_is_told_whenever_it_is_asked_for(server: Server, root: Path) -> None:
    (made_run(root / "damaged") / "launch.json").write_text("{")
    for path in ("/run/damaged", "/run/damaged", "/compare?run=damaged&run=scout"):
        answer = server.get(path)
        assert (answer.status, "launch.json: cannot be read" in answer.body) == (500, True), path


class HeldStill:
    """In the place of `Look.series`: it is read by who holds the run's lock, and by nobody else."""

    def __init__(self) -> None:
        self.read = 0

    def __set__(self, look: Look, series: Series) -> None:
        look.__dict__["series"] = series

    def __get__(self, look: Look, _: type) -> Series:
        assert look.lock._is_owned(), "another thread may add a step at this moment"
        self.read += 1
        return look.__dict__["series"]


def test_no_screen_reads_a_series_that_another_thread_may_add_to(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = HeldStill()
    monkeypatch.setattr(Look, "series", guard, raising=False)
    scope = {"type": "http", "headers": [], "query_string": b"run=scout&run=slow"}
    request = Request(scope | {"path_params": {"name": "scout"}})
    for screen in (Pages.runs, Pages.people, Pages.run, Pages.compare):
        guard.read = 0
        assert screen(Pages(Gallery(root)), request).status_code == 200
        assert guard.read, screen
    watched = Gallery(root).run("scout")
    assert watched is not None
    assert RunFeed(watched).news() is not None


def test_only_reading_is_possible_and_only_by_the_names_of_this_machine(server: Server) -> None:
    assert server.get("/", method="POST").status == 405
    assert server.get("/", Host="127.0.0.1:1").status == 200
    assert server.get("/", Host="localhost").status == 200
    for host in ("evil.example", "127.0.0.1.evil.example", ""):
        assert server.get("/", Host=host).status == 400, host
    policy = server.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert set(re.findall(r"(?:script|connect)-src ([^;]*)", policy)) == {"'self'"}


def test_the_chart_library_is_that_of_the_installed_package(server: Server) -> None:
    import plotly

    script = server.get("/static/plotly.js").body
    assert script == (Path(plotly.__file__).parent / "package_data" / "plotly.min.js").read_text()


def test_a_line_that_is_written_is_told_and_looking_writes_nothing(server: Server, root: Path) -> None:
    before = tree(root / "scout")
    (first,) = server.events("/events/run/scout", 1)
    assert {"charts", "panels", "title"} <= first.keys()
    assert tree(root / "scout") == before
    (listed,) = server.events("/events/runs", 1)
    assert "30 of 100" in listed["panels"]["runs"]


def test_a_folder_that_another_process_holds_is_shown_as_running(server: Server, root: Path) -> None:
    with RunLock(root / "people", RUN):
        assert "1 training" in server.get("/people").body
    assert "adapter</a>" not in server.get("/people").body


def test_in_the_network_only_who_has_the_token_may_look(root: Path) -> None:
    with served(root / "scout", "--lan") as server:
        found = [urlsplit(address) for address in server.addresses]
        assert {one.path for one in found} == {"/run/scout"}
        (token,) = {one.query.removeprefix("token=") for one in found}
        assert len(token) >= 20
        assert not any((one.hostname or "").startswith("127.") for one in found)
        for path in ("/", "/run/scout", "/events/run/scout", "/static/page.js", "/?token=", "/?token=wrong"):
            answer = server.get(path)
            assert answer.status == 403, path
            assert "scout" not in answer.body
        assert server.get("/", Cookie="mlx_empire_token=wrong").status == 403
        welcome = server.get(f"/run/scout?token={token}")
        assert (welcome.status, welcome.headers["location"]) == (303, "/run/scout")
        cookie = welcome.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "samesite=strict" in cookie.lower()
        assert "30 of 100" in server.get("/run/scout", Cookie=cookie.partition(";")[0]).body
        assert server.get("/", Host="evil.example", Cookie=cookie.partition(";")[0]).status == 400
        assert server.get("/", Host=str(found[0].hostname), Cookie=cookie.partition(";")[0]).status == 200
        assert server.get(f"//evil.example/?a=1&token={token}").headers["location"] == "/evil.example/?a=1"


@pytest.mark.slow
def test_ctrl_c_ends_it_at_once_though_a_page_is_open(root: Path) -> None:
    with served(root) as server:
        server.events("/events/runs", 1)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=60) == 0


@pytest.mark.slow
def test_a_port_that_is_taken_is_told_in_one_line(server: Server, root: Path) -> None:
    command = [sys.executable, "-m", "mlx_empire", "open", str(root), "--port", str(server.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 64
    assert done.stderr.count("\n") == 1
    assert f"--port {server.port}" in done.stderr


@pytest.mark.parametrize(
    ("here", "typed", "root", "start"),
    [
        ("home", "runs/scout", "home/runs", "/run/scout"),
        ("home/runs/scout", ".", "home/runs", "/run/scout"),
        ("home/runs/scout/final", "..", "home/runs", "/run/scout"),
        ("home/runs", ".", "home/runs", "/"),
        ("home", "runs/people/alice", "home/runs", "/run/people/alice"),
        ("home", "runs/a/b/c/d/deep", "home/runs/a/b/c/d", "/run/deep"),
        ("home", ".hidden", "home/.hidden", "/run/.hidden"),
    ],
)
def test_a_runs_folder_is_opened_however_it_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: str, typed: str, root: str, start: str
) -> None:
    home = tmp_path / "home"
    for name in ("runs/scout", "runs/people/alice", "runs/a/b/c/d/deep", ".hidden"):
        made_run(home / name, 1)
    (home / "runs" / "scout" / "final").mkdir()
    monkeypatch.chdir(tmp_path / here)
    assert root_of(Path(typed)) == (tmp_path / root, start)
    if start != "/":
        assert Gallery(tmp_path / root).run(start.removeprefix("/run/")) is not None


def test_wrong_words_are_told_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected 1 to 65535" in said(capsys, "open", "--port", "0", code=64)


def test_help_and_wrong_words_import_no_server_and_no_templates() -> None:
    program = (
        "import sys\nfrom mlx_empire.cli import main\n"
        "for words in (['open', '--help'], ['open', '--port', '0']):\n"
        "    try:\n        main(words)\n    except SystemExit:\n        pass\n"
        "assert not {'mlx', 'transformers', 'starlette', 'uvicorn', 'jinja2', 'plotly'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


@pytest.mark.slow
def test_a_page_of_100000_steps_is_sent_in_two_megabytes(tmp_path: Path) -> None:
    folder = made_long(tmp_path / "runs" / "week")
    with served(folder) as server:
        sent = [server.get(path).body for path in ("/run/week", "/static/page.css", "/static/page.js")]
        (message,) = server.events("/events/run/week", 1)
    assert sum(map(len, sent)) + len(json.dumps(message)) < MOST_BYTES
    points = [len(one["points"][0]) for chart in message["charts"] for one in chart["lines"]]
    assert 1000 < max(points) <= 2000
