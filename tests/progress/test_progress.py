"""Where each thread is can be read at any time, and the launcher hears of it, and of nothing else."""

import json
import os
import threading

import pytest

from mlx_empire import progress


@pytest.fixture(autouse=True)
def clean():
    """No hook and step 0 after each test."""
    yield
    progress.on_reach(None)
    progress.begin_step(0)


def test_places_are_known_by_thread():
    progress.begin_step(7)
    progress.reach("backward")
    other = threading.Thread(target=progress.reach, args=("save-write",), name="writer")
    other.start()
    other.join()
    places = progress.places()
    assert (places["MainThread"].phase, places["MainThread"].step) == ("backward", 7)
    assert (places["writer"].phase, places["writer"].step) == ("save-write", 7)


def test_a_thread_that_leaves_is_nowhere():
    def work() -> None:
        progress.reach("save-write")
        progress.leave()

    other = threading.Thread(target=work, name="leaver")
    other.start()
    other.join()
    assert "leaver" not in progress.places()


def test_a_thread_that_advances_stays_where_it_is():
    progress.begin_step(2)
    progress.reach("load")
    before = progress.places()["MainThread"]
    before.since = 0.0
    progress.advance()
    place = progress.places()["MainThread"]
    assert (place.phase, place.step) == ("load", 2)
    assert place.since > 0.0


def test_the_hook_is_called_after_the_mark_until_it_is_taken_away():
    seen = []
    progress.on_reach(lambda phase, step: seen.append((phase, step, progress.places()["MainThread"].phase)))
    progress.begin_step(3)
    progress.reach("forward")
    progress.on_reach(None)
    progress.reach("backward")
    assert seen == [("forward", 3, "forward")]


def test_the_launcher_hears_of_a_phase_once_and_before_the_hook(monkeypatch, capfd):
    def fail(phase: str, step: int) -> None:
        raise RuntimeError(phase)

    progress.reach("data")  # so that it is told where this thread is now, whatever ran before
    monkeypatch.setenv("MLX_EMPIRE_BEACON", "1")
    progress.begin_step(3)
    progress.on_reach(fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="forward"):
            progress.reach("forward")
    (line,) = capfd.readouterr().err.splitlines()
    mark, _, text = line.partition(" ")
    assert mark == "@mlx_empire"
    told = json.loads(text)
    assert (told["event"], told["thread"], told["phase"], told["step"]) == (
        "place",
        "MainThread",
        "forward",
        3,
    )
    assert told["pid"] == os.getpid()


def test_nobody_is_told_anything_where_no_launcher_listens(monkeypatch, capfd):
    monkeypatch.delenv("MLX_EMPIRE_BEACON", raising=False)
    progress.begin_step(4)
    progress.reach("forward")
    progress.tell_failure(70, "something")
    assert capfd.readouterr().err == ""
