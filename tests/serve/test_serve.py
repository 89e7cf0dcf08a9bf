"""Many adapters of one base over HTTP: each answer is what mlx-lm alone says with that adapter; others are refused."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx_lm.server
import pytest
from support.mpi import rank_environment
from support.speaking import MODEL, answers, finish, write_adapter

from mlx_empire.cli import main as cli
from mlx_empire.serve.command import read
from mlx_empire.serve.people import people_in
from mlx_empire.serve.server import Server, serve

PEOPLE: dict[str, dict[str, Any]] = {
    "alice": {"seed": 100},
    "bob": {"seed": 200, "rank": 8, "scale": 1.0},
    "carl": {"seed": 300, "kind": "dora"},
    "dora": {"seed": 400},
}
PROMPTS = ("Once upon a time", "Tom said", "The little dog", "In the garden there was", "She")
TOKENS = 8


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four finished daughters, one of whom has two generations, one that is not finished, and what is none."""
    folder = tmp_path_factory.mktemp("serve") / "people"
    for name, about in PEOPLE.items():
        write_adapter(folder / name / "final", **about)
        finish(folder / name)
    write_adapter(folder / "dora/generations/2/final", seed=500)
    finish(folder / "dora/generations/2")
    (folder / "dora/current").symlink_to("generations/2/final")
    write_adapter(folder / "late/final", seed=600)
    finish(folder / "late")
    (folder / "late/COMPLETE").unlink()
    (folder / "notes").mkdir()
    return folder


class Asked:
    """A server that runs in this process, and how often it read a base."""

    def __init__(self, url: str, loads: list[str]) -> None:
        self.url, self.loads = url, loads

    def get(self, path: str) -> tuple[int, Any]:
        return fetched(urllib.request.Request(f"{self.url}{path}"))

    def ask(self, **body: Any) -> tuple[int, Any]:
        return fetched(post(self.url, body))

    def said(self, name: str, prompt: str) -> str:
        code, found = self.ask(model=name, prompt=prompt, max_tokens=TOKENS)
        assert code == 200, found
        text: str = found["choices"][0]["text"]
        return text


def post(url: str, body: dict[str, Any]) -> urllib.request.Request:
    headers = {"Content-Type": "application/json"}
    return urllib.request.Request(f"{url}/completions", json.dumps(body).encode(), headers)


def fetched(request: urllib.request.Request) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.fixture(scope="module")
def server(runs: Path) -> Iterator[Asked]:
    loads: list[str] = []
    real = mlx_lm.server.load

    def counted(path: str, *words: Any, **options: Any) -> Any:
        loads.append(str(path))
        return real(path, *words, **options)

    mlx_lm.server.load = counted
    options: argparse.Namespace = read([str(runs), "--port", "0"])
    with Server(options.host, options.port) as made:
        thread = threading.Thread(target=serve, args=(made, people_in(runs, None), options))
        thread.start()
        yield Asked(made.url, loads)
        made.shutdown()
        thread.join()
    mlx_lm.server.load = real


def expected(adapter: Path, *prompts: str) -> list[str]:
    """What mlx-lm alone says with the adapter in a folder."""
    return answers(prompts, adapter, TOKENS)


def test_twenty_at_once_are_each_answered_as_mlx_lm_alone_answers(runs: Path, server: Asked) -> None:
    asked = [(name, prompt) for prompt in PROMPTS for name in PEOPLE]
    assert len(asked) == 20
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda one: server.said(*one), asked))
    for name in PEOPLE:
        used = runs / name / ("current" if name == "dora" else "final")
        mine = [text for (who, _), text in zip(asked, found, strict=True) if who == name]
        assert mine == expected(used, *PROMPTS)
    assert len(set(found)) > 10, "adapters and prompts matter"
    assert server.loads == [str(MODEL)], "the base is read once"


def test_the_names_are_those_that_can_be_asked(server: Asked) -> None:
    code, found = server.get("/models")
    assert code == 200
    assert [one["id"] for one in found["data"]] == sorted(PEOPLE)
    assert server.get("/models/alice")[1]["data"][0]["id"] == "alice"
    assert server.get("/models/late")[0] == 404


@pytest.mark.parametrize(
    "name", ["late", "notes", "nobody", "../people/alice", "default_model", str(MODEL), ""]
)
def test_any_other_name_is_refused_with_those_there_are(name: str, server: Asked) -> None:
    code, found = server.ask(model=name, prompt="Tom", max_tokens=2)
    assert code == 404
    assert found["error"].endswith("nobody of that name is served; there is alice, bob, carl, dora")
    assert server.loads == [str(MODEL)]


@pytest.mark.parametrize("more", [{"adapters": "/tmp"}, {"draft_model": "x"}])
def test_nothing_else_is_loaded(more: dict[str, str], server: Asked) -> None:
    code, found = server.ask(model="alice", prompt="Tom", **more)
    assert code == 400
    assert "name a person in model" in found["error"]


def test_what_takes_its_place_answers_from_then_on(runs: Path, server: Asked) -> None:
    """A generation that is rolled back, one that is trained anew, and somebody who is finished meanwhile."""
    before = server.said("alice", "Tom said")
    try:
        draft = runs / "dora/.current"
        draft.symlink_to("final")
        os.replace(draft, runs / "dora/current")
        assert [server.said("dora", "Tom said")] == expected(runs / "dora/final", "Tom said")
        shutil.rmtree(runs / "alice/final")
        write_adapter(runs / "alice/final", seed=700)
        after = server.said("alice", "Tom said")
        assert [after] == expected(runs / "alice/final", "Tom said")
        assert after != before
        finish(runs / "late")
        assert [server.said("late", "She")] == expected(runs / "late/final", "She")
        assert server.loads == [str(MODEL)]
    finally:
        (runs / "late/COMPLETE").unlink(missing_ok=True)


def test_an_adapter_of_another_base_is_not_served(runs: Path, server: Asked) -> None:
    plan = runs / "bob/plan.json"
    plan.write_text(json.dumps({"base_digest": "of other weights"}))
    try:
        assert server.ask(model="bob", prompt="Tom", max_tokens=2)[0] == 404
    finally:
        plan.write_text("{}")
    assert server.ask(model="bob", prompt="Tom", max_tokens=2)[0] == 200


def test_it_listens_on_this_machine_alone_unless_told(runs: Path, server: Asked) -> None:
    assert server.url.startswith("http://127.0.0.1:")
    assert read([str(runs)]).host == "127.0.0.1"


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        cli(["serve", *words])
    assert ended.value.code == 64
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_what_cannot_be_served_is_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no such folder" in refused([str(tmp_path / "nowhere")], capsys)
    assert "no finished daughter is in it" in refused([str(tmp_path)], capsys)
    shutil.copytree(runs / "alice", tmp_path / "runs/alice")
    shutil.copytree(runs / "bob", tmp_path / "runs/bob")
    finish(tmp_path / "runs/bob", tmp_path / "other")
    assert "name the one that is to be served" in refused([str(tmp_path / "runs")], capsys)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port: 127.0.0.1:{port}: " in refused([str(runs), "--port", str(port)], capsys)


@pytest.mark.faults
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_while_it_answers_it_leaves_nothing_behind(how: signal.Signals, runs: Path) -> None:
    before = {p: p.lstat().st_mtime_ns for p in runs.rglob("*")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "mlx_empire", "serve", str(runs), "--port", str(port)]
    for _ in range(2):  # the second one finds the port free
        process = subprocess.Popen(
            line,
            env=rank_environment(str(runs.parent)),
            cwd=runs.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline().startswith("serving alice, bob, carl, dora on http://127.0.0.1:")
        body = {"model": "alice", "prompt": "She", "max_tokens": 400}
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(fetched, post(f"http://127.0.0.1:{port}/v1", body)) for _ in range(4)]
            time.sleep(0.5)
            process.send_signal(how)
            assert process.wait(30) != 0
            assert any(one.exception() is not None or one.result()[0] == 200 for one in asked)
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    assert {p: p.lstat().st_mtime_ns for p in runs.rglob("*")} == before
