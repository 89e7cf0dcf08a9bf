"""What is posted, to whom, and that nothing of it can hold up or fail a run, or tell an address that is a secret."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from launch.launching import Launching

from mlx_empire.errors import UserError
from mlx_empire.launch import notices
from mlx_empire.launch.ending import MAIN_THREAD, Events
from mlx_empire.launch.notices import Notifier, StallWatch, address
from mlx_empire.recipe.load import load_recipe
from mlx_empire.recipe.notices import KINDS, Notify


class Stub:
    """A webhook on this machine: `posts` are (path, headers, body); `answer` is (code, headers)."""

    def __init__(self) -> None:
        stub = self
        self.posts: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.gets = 0
        self.answer: tuple[int, dict[str, str]] = (200, {})
        self.silent = threading.Event()
        self.silent.set()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.posts.append((self.path, dict(self.headers), body))
                stub.silent.wait(20)
                self.send_response(stub.answer[0])
                for name, value in stub.answer[1].items():
                    self.send_header(name, value)
                self.end_headers()

            def do_GET(self) -> None:
                stub.gets += 1
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/secret-topic"


@pytest.fixture
def stub() -> Iterator[Stub]:
    made = Stub()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.silent.set()
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def send(stub: Stub, *sent: tuple[str, str], on: tuple[str, ...] = KINDS) -> list[str]:
    said: list[str] = []
    with Notifier(Notify(url="$HOOK", on=on), {"HOOK": stub.url}, "scout", said.append) as notifier:  # type: ignore[arg-type]
        for one in sent:
            notifier.send(*one)
    return said


def test_one_post_has_what_each_reader_looks_for(stub: Stub) -> None:
    assert send(stub, ("end", "the run is complete @everyone")) == []
    ((path, headers, body),) = stub.posts
    assert path == "/secret-topic"
    sentence = "scout: end: the run is complete @everyone"
    assert body["text"] == sentence, "Slack"
    assert body["content"] == sentence, "Discord"
    assert body["allowed_mentions"] == {"parse": []}, "Discord: nobody is called by a name in a sentence"
    assert (body["event"], body["message"]) == ("end", "the run is complete @everyone"), "Home Assistant"
    # ntfy fills its templates from the body: these two make title and message of it.
    assert headers["Template"] == "yes"
    assert body[headers["Title"].strip("{.}")] == "scout: end"
    assert body[headers["Message"].strip("{.}")] == "the run is complete @everyone"
    assert headers["Content-Type"] == "application/json"


def test_only_what_was_asked_for_is_sent_in_order_and_cut_where_discord_would_refuse(stub: Stub) -> None:
    send(stub, ("spike", "x"), ("restart", "y" * 5000), ("failure", "z"), on=("restart", "failure"))
    assert [body["event"] for _, _, body in stub.posts] == ["restart", "failure"]
    assert len(stub.posts[0][2]["content"]) < 2000
    assert [headers["Priority"] for _, headers, _ in stub.posts] == ["default", "high"]


@pytest.mark.parametrize("code", [404, 500, 302])
def test_a_refusal_is_said_without_the_address_and_the_next_notice_goes_out(stub: Stub, code: int) -> None:
    stub.answer = (code, {"Location": stub.url})
    said = send(stub, ("end", "a"), ("end", "b"))
    assert said == [f"report.notify: the notice of end was not sent: the server answered {code}"] * 2
    assert len(stub.posts) == 2
    assert stub.gets == 0, "a redirect would drop the body"


def test_nobody_there_is_said_without_the_address() -> None:
    said: list[str] = []
    with Notifier(Notify(url="http://127.0.0.1:9/secret-topic"), {}, "scout", said.append) as notifier:
        notifier.send("end", "a")
    assert said == ["report.notify: the notice of end was not sent: Connection refused"]


def test_a_server_that_is_silent_holds_nobody_up(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "TIMEOUT_SECONDS", 0.2)
    stub.silent.clear()
    said: list[str] = []
    with Notifier(Notify(url=stub.url), {}, "scout", said.append) as notifier:
        notifier.send("end", "a")
        assert said == [], "send returns before anything was answered"
        wait_for(lambda: said)
    assert said == ["report.notify: the notice of end was not sent: no answer in time"]


def wait_for(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_without_the_key_nothing_is_sent() -> None:
    said: list[str] = []
    with Notifier(None, {}, "scout", said.append) as notifier:
        for kind in KINDS:
            notifier.send(kind, "a")
    assert said == []


def test_a_mac_shows_words_that_are_no_part_of_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, seen = tmp_path / "osascript", tmp_path / "seen"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$3" "$4" > "{seen}"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("sys.platform", "darwin")
    with Notifier(Notify(), {}, "scout", lambda text: None) as notifier:
        notifier.send("end", 'a" & do shell script "false')
    assert seen.read_text().splitlines() == ["scout: end", 'a" & do shell script "false']


def test_an_address_takes_names_from_the_environment_and_an_error_never_shows_values() -> None:
    assert address(Notify(url="https://ntfy.sh/$TOPIC"), {"TOPIC": "t"}) == "https://ntfy.sh/t"
    assert (
        address(Notify(url="${HOOK}"), {"HOOK": "https://hooks.slack.com/x"}) == "https://hooks.slack.com/x"
    )
    assert address(Notify(), {}) is None
    with pytest.raises(UserError, match="the environment has no TOPIC; export it"):
        address(Notify(url="https://ntfy.sh/$TOPIC"), {})
    for value in ("file:///etc/passwd", "https://a b", "https://a/\nHost: b", "ftp://canary"):
        with pytest.raises(UserError, match=r"report\.notify: \$HOOK: ") as refused:
            address(Notify(url="$HOOK"), {"HOOK": value})
        assert value not in str(refused.value)


@pytest.mark.parametrize(
    "written",
    [
        "{url: https://hooks.slack.com/services/T0/B0/canary}",
        "{url: https://discord.com/api/webhooks/1/canary}",
        "{url: http://home.local:8123/api/webhook/canary}",
        "{url: https://user:canary@ntfy.example/t}",
        "{url: file:///canary}",
        "{url: 'https://ntfy.sh/$1'}",
        "{url: https://ntfy.sh/t, on: [sometimes]}",
        "{url: https://ntfy.sh/t, on: []}",
        "{address: https://ntfy.sh/t}",
    ],
)
def test_a_recipe_takes_no_secret_and_no_other_scheme_or_kind(written: str, tmp_path: Path) -> None:
    recipe = Launching(tmp_path).folder / "recipe.yaml"
    with pytest.raises(UserError, match=r"report\.notify") as refused:
        load_recipe(recipe, [f"report.notify={written}"])
    assert "\n" not in str(refused.value)
    assert load_recipe(recipe, ["report.notify={url: $HOOK}"]).report.notify == Notify(url="$HOOK")


def at(step: int, phase: str = "forward") -> Events:
    return Events(places={0: {MAIN_THREAD: (phase, step)}, 1: {MAIN_THREAD: ("reduce", step)}})


def test_a_stall_is_told_once_when_a_step_takes_three_times_the_longest_and_ten_minutes() -> None:
    watch = StallWatch()
    seen = [watch.stalled(at(step), 300.0 * step) for step in (1, 2, 3)]
    assert seen == [None] * 3
    assert watch.stalled(at(3), 900 + 899) is None
    told = watch.stalled(at(3), 900 + 901)
    assert told == (
        "step 3 goes on for 15 min 01 s, the longest before took 5 min 00 s (rank 0 in forward; rank 1 in reduce)"
    )
    assert watch.stalled(at(3), 5000) is None
    # It ended after all: another step as long is no news.
    assert watch.stalled(at(4), 6000) is None
    assert watch.stalled(at(4), 6000 + 5100) is None


def test_short_steps_and_what_is_no_step_are_no_stall() -> None:
    watch = StallWatch()
    for step in (1, 2):
        watch.stalled(at(step), float(step))
    assert watch.stalled(at(2), 500) is None
    assert watch.stalled(at(2, "evaluate"), 900) is None
    assert watch.stalled(at(2, "evaluate"), 90_000) is None
    assert watch.stalled(at(2, "save-wait"), 99_000) is None
    first = StallWatch()
    assert first.stalled(at(1), 1) is None
    assert first.stalled(at(1), 99_999) is None, "the first step has nothing to be compared with"


def test_a_real_launch_tells_of_its_gate_and_its_end(stub: Stub, tmp_path: Path) -> None:
    launching = Launching(tmp_path, hosts="localhost slots=1\n")
    ended = launching.launch(
        "run.steps=4",
        "run.eval_every=2",
        "data.validation_split=0.5",
        "evaluation.stop_when={metric: eval_loss, at_most: 99}",
        "report.notify={url: $CANARY_HOOK}",
        env={"CANARY_HOOK": stub.url},
    )
    assert ended.code == 0, ended.stderr
    bodies = [body for _, _, body in stub.posts]
    assert [body["event"] for body in bodies] == ["gate", "end"]
    assert bodies[0]["message"].startswith("the gate is reached at step 0")
    assert bodies[1]["message"].startswith("the run is complete, exit code 0")
    assert bodies[1]["title"] == "run: end"
    kept = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert b"CANARY_HOOK" in kept
    assert b"secret-topic" not in kept
    assert "secret-topic" not in ended.stdout + ended.stderr
