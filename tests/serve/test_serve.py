"""Many adapters of one base over HTTP: each answer is what mlx-lm alone says with that adapter; others are refused."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx_lm.server
import pytest
from serve.asking import PEOPLE, PROMPTS, Asked, expected, fetched, post
from support.mpi import rank_environment
from support.speaking import MODEL, finish, write_adapter

from mlx_empire.errors import EmpireError, UserError
from mlx_empire.serve.command import read
from mlx_empire.serve.people import people_in
from mlx_empire.serve.server import Server, serve


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


def test_requests_of_one_person_share_a_batch(server: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four that wait when their adapter is put on: a pass of the model makes a token for each."""
    generator, sizes = server.made.generator, []
    assert generator is not None
    server.said("bob", "She")  # from here on the batch is another person's
    load = generator.model_provider.load

    def once_all_wait(*words: Any) -> Any:
        deadline = time.monotonic() + 60
        while generator.requests.qsize() < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        return load(*words)

    class Counted(mlx_lm.server.BatchGenerator):  # type: ignore[misc]
        def next(self) -> Any:
            found = super().next()
            sizes.append(len(found[1]))
            return found

    monkeypatch.setattr(generator.model_provider, "load", once_all_wait)
    monkeypatch.setattr(mlx_lm.server, "BatchGenerator", Counted)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: server.said("alice", prompt), PROMPTS[:4]))
    assert all(found)
    assert max(sizes) == 4, sizes


def test_no_web_page_may_ask_but_those_that_are_allowed(
    server: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by what a browser sends without asking before: text, and a form."""
    body = json.dumps({"model": "alice", "prompt": "Tom", "max_tokens": 2}).encode()
    settings = server.made.generator.cli_args  # type: ignore[union-attr]

    def of_page(origin: str, kind: str) -> int:
        headers = {"Content-Type": kind, "Origin": origin}
        code, found = fetched(urllib.request.Request(f"{server.url}/completions", body, headers))
        assert code == 200 or "--allowed-origins names those that may" in found["error"]
        return code

    for kind in ("text/plain", "application/json"):
        assert of_page("http://evil.example", kind) == 403
        assert of_page("null", kind) == 403
    names = urllib.request.Request(f"{server.url}/models", headers={"Origin": "http://evil.example"})
    assert fetched(names)[0] == 403
    monkeypatch.setattr(settings, "allowed_origins", ["http://mine.example"])
    assert of_page("http://mine.example", "text/plain") == 200
    assert of_page("http://evil.example", "text/plain") == 403
    monkeypatch.setattr(settings, "allowed_origins", ["*"])
    assert of_page("http://evil.example", "text/plain") == 200


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("127.0.0.1", 200),
        ("LocalHost:8080", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        ("evil.example:8080", 403),
        ("127.0.0.1.evil.example", 403),
        ("user@localhost.evil.example", 403),
        ("[", 403),
        ("", 403),
    ],
)
def test_on_this_machine_alone_it_is_asked_by_a_name_of_this_machine(
    host: str, code: int, server: Asked
) -> None:
    found = server.made.server_address[:2]
    asked = http.client.HTTPConnection(str(found[0]), int(found[1]), timeout=60)
    asked.request("GET", "/v1/models", headers={"Host": host})
    assert asked.getresponse().status == code
    asked.close()


def test_the_name_that_host_says_is_one_too() -> None:
    with Server("127.0.0.2", 0) as made:
        assert made.on_loopback
        assert made.is_named("127.0.0.2:9")
        assert not made.is_named("127.0.0.3")
    with Server("0.0.0.0", 0) as open_to_all:
        assert not open_to_all.on_loopback


def test_what_somebody_asks_is_written_nowhere(
    server: Asked, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    for body in (b'{"prompt": "my secret', b'["my secret"]'):
        request = urllib.request.Request(f"{server.url}/completions", body)
        assert fetched(request)[0] == 400
    bad = urllib.request.Request(f"{server.url}/completions", b"my secret \xff")
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        fetched(bad)
    wait_for(lambda: "could not be answered" in capfd.readouterr().err)
    assert caplog.text == ""


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_goes_wrong_with_a_request_is_one_line_and_a_client_that_hangs_up_none(
    server: Asked, capfd: pytest.CaptureFixture[str]
) -> None:
    for error in (BrokenPipeError(), ConnectionResetError(), ValueError("my secret")):
        try:
            raise error
        except (OSError, ValueError):
            server.made.handle_error(None, None)
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("a request could not be answered: ValueError in test_what_goes_wrong")
    assert "secret" not in said


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": ["Tom"]}),
        ("completions", {"prompt": "Tom", "stop": [1]}),
        ("completions", {"prompt": "Tom", "stop": 1}),
        ("chat/completions", {"messages": "Tom"}),
        ("chat/completions", {"messages": ["Tom"]}),
    ],
)
def test_what_would_end_the_thread_that_generates_is_refused(
    path: str, body: dict[str, Any], server: Asked
) -> None:
    asked = json.dumps({"model": "bob", "max_tokens": 2, **body}).encode()
    code, found = fetched(urllib.request.Request(f"{server.url}/{path}", asked))
    assert code == 400
    assert " must be " in found["error"]
    assert server.ask(model="bob", prompt="Tom", max_tokens=2)[0] == 200


def test_where_the_thread_that_generates_has_ended_the_command_ends() -> None:
    with Server("127.0.0.1", 0) as made:
        made.generator = argparse.Namespace(generation_available=lambda: False)
        with pytest.raises(EmpireError, match="begin this command again"):
            made.serve_forever()


def test_a_base_that_mlx_lm_does_not_open_is_one_line(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(MODEL, tmp_path / "base")
    (tmp_path / "base/config.json").write_text('{"model_type": "of\\nnobody"}')
    options = read([str(runs), "--port", "0"])
    with Server(options.host, 0) as made, pytest.raises(EmpireError) as caught:
        serve(made, people_in(runs, tmp_path / "base"), options)
    assert str(caught.value).startswith(f"{tmp_path}/base: mlx-lm does not open it: ")
    assert "\n" not in str(caught.value)
    assert caplog.text == ""
    assert capfd.readouterr().err == ""


def test_with_a_base_of_its_own_no_recipe_is_read(runs: Path, tmp_path: Path) -> None:
    for name in ("alice", "bob"):
        shutil.copytree(runs / name, tmp_path / name)
    (tmp_path / "bob/recipe.yaml").write_text("model: {")
    assert people_in(tmp_path, MODEL).names == ["alice", "bob"]
    with pytest.raises(UserError, match=r"bob/recipe\.yaml"):
        people_in(tmp_path, None)


def test_it_listens_on_this_machine_alone_unless_told(runs: Path, server: Asked) -> None:
    assert server.url.startswith("http://127.0.0.1:")
    assert read([str(runs)]).host == "127.0.0.1"


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
        body = {"model": "alice", "prompt": "She", "max_tokens": 100_000}
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(fetched, post(f"http://127.0.0.1:{port}/v1", body)) for _ in range(4)]
            time.sleep(0.5)
            process.send_signal(how)
            try:
                assert process.wait(30) != 0
            finally:
                process.kill()  # one that goes on would be waited for
            cut = [isinstance(one.exception(), OSError | http.client.HTTPException) for one in asked]
        assert any(cut), "it was killed while it answered"
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    assert {p: p.lstat().st_mtime_ns for p in runs.rglob("*")} == before
