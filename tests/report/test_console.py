import io
import os
import queue
import re
import time

import pytest
from rich.console import Console

from mlx_empire.plan.lengths import Every
from mlx_empire.progress import Passing
from mlx_empire.report import console as console_module
from mlx_empire.report.console import RunDisplay, said_if_slow
from mlx_empire.report.text import NodeRow

GIB = 2**30
KING = NodeRow("king.local", "king", 0.7, 300 * GIB, 400 * GIB)
SOLDIER = NodeRow("soldier-1.local", "soldier", 0.3, 210 * GIB, 208 * GIB)


def record(step: int, **changes: object) -> dict[str, object]:
    values = {
        "step": step,
        "loss": 2.5,
        "learning_rate": 1e-5,
        "grad_norm": 0.75,
        "tokens_per_second": 12345.6,
        "step_seconds": 10.0,
        "peak_bytes": [200 * GIB, 156 * GIB],
    }
    return values | changes


def plain(total: int = 20, title=(), nodes=(KING, SOLDIER), encoding: str = "utf-8"):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    return RunDisplay(total, nodes, title, stream=stream), stream


def written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode(stream.encoding)


def row_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if name in line)


def test_the_header_gives_the_verdict_of_each_node():
    display, stream = plain(title=[("model", "models/[scout]"), ("stage", "3")])
    text = written(stream)
    assert not display.is_live
    assert re.search(r"model +models/\[scout\]", text)
    assert re.search(
        r"king\.local +king +70\.0% +300 GiB +400 GiB +█{9}░{3} +75% +yes", row_of(text, "king.local")
    )
    assert re.search(r"soldier +30\.0% +210 GiB +208 GiB +█{12} +101% +NO", row_of(text, "soldier-1"))


def test_the_header_fits_eighty_columns(monkeypatch):
    monkeypatch.setattr(console_module, "PLAIN_WIDTH", 80)
    _, stream = plain()
    assert re.search(r"soldier-1\.local .* NO$", written(stream).rstrip())


def test_without_a_terminal_each_step_is_one_line_without_control_codes():
    display, stream = plain()
    header = written(stream)
    display.step(record(1))
    display.evaluation({"step": 1, "eval_loss": 3.25})
    display.step(record(2, loss=2.25, peak_bytes=[392 * GIB, 1]))
    display.evaluation({"step": 2, "eval_loss": 3.0})
    display.message("saved [runs/x]")
    display.close({"loss": 2.25})
    lines = written(stream)[len(header) :].splitlines()
    assert lines[0].startswith("step  1/20  loss 2.5000  lr 1.00e-05  grad norm 0.75  targets/s 12,346")
    assert "memory 75% (soldier-1.local)" in lines[0]
    assert lines[1] == "step  1/20  eval loss 3.2500"
    assert "loss 2.2500" in lines[2]
    assert "memory 98% (king.local)" in lines[2]
    assert lines[3] == "step  2/20  eval loss 3.0000  (was 3.2500)"
    assert lines[4] == "saved [runs/x]"
    assert re.fullmatch(r"loss +2\.25", lines[5])
    assert len(lines) == 6
    assert "\x1b" not in written(stream)


def test_a_log_in_ascii_gets_ascii():
    display, stream = plain(encoding="ascii")
    display.step(record(1))
    display.close({"saved": "runs/x"})
    assert "#########..." in row_of(written(stream), "king.local")


def test_figures_that_are_not_finite_are_shown_as_such():
    display, stream = plain()
    display.step(record(1, loss=float("nan"), grad_norm=None))
    assert "loss nan" in written(stream)
    assert "grad norm nan" in written(stream)


def test_lines_come_as_often_as_asked_and_at_both_ends(monkeypatch):
    for every, told in ((Every(3), [1, 3, 6, 8]), (Every(seconds=120), [1, 3, 6, 8]), (None, [*range(1, 9)])):
        stream, minutes = io.StringIO(), iter([0, 1, 2, 3, 3.5, 4, 5, 5.5])
        now = [0.0]
        monkeypatch.setattr(time, "monotonic", lambda at=now: at[0])
        display = RunDisplay(8, [], stream=stream, log_every=every)
        for step, minute in enumerate(minutes, 1):
            now[0] = 60.0 * minute
            display.step(record(step))
        assert [int(line.split("/")[0].split()[1]) for line in stream.getvalue().splitlines()] == told


def test_time_left_goes_by_the_pace_of_the_steps_after_the_first(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    display, stream = plain(total=20)

    def left(step: int, seconds_later: float) -> str:
        now[0] += seconds_later
        display.step(record(step, step_seconds=30.0))
        return written(stream).splitlines()[-1].rpartition("  left ")[2]

    # A run resumed at step 10: the first step took 30 s with compiling, the others 5 s each.
    assert left(11, 30) == "4 min 30 s"
    assert left(12, 5) == "40 s"
    assert left(13, 5) == "35 s"
    assert left(20, 35) == "0 s"


def live(total: int = 20) -> tuple[RunDisplay, io.StringIO]:
    stream = io.StringIO()
    return RunDisplay(total, [KING, SOLDIER], mode="always", stream=stream), stream


def drawn(display: RunDisplay) -> str:
    console = Console(file=io.StringIO(), record=True, width=100)
    console.print(display._progress())
    return console.export_text()


def test_a_running_save_is_shown_live():
    display, _ = live()
    display.step(record(1))
    assert "saving" not in drawn(display)
    display.status = lambda: "saving step-000001  40% of this rank's 3.2 GB"
    assert "saving step-000001  40% of this rank's 3.2 GB" in drawn(display)
    display.close()


def test_figures_of_a_live_display_stand_still_and_tell_what_part_is_learnt():
    display, _ = live()
    seen = []
    for norm, speed in ((0.961, 1000.0), (14.3, 12345.0)):
        display.step(record(1, grad_norm=norm, tokens_per_second=speed, tokens=157, positions=512))
        seen.append(row_of(drawn(display), "grad norm"))
    assert seen[0].index("targets/s") == seen[1].index("targets/s")
    assert all(line.rstrip().endswith("learnt  31%") for line in seen)
    display.close()


def test_a_passing_line_is_replaced_by_the_next_and_the_last_one_stays():
    display, stream = live()
    display.step(record(1))
    display.message(Passing("step-000001 saved"))
    assert "step-000001 saved" in drawn(display)
    display.message(Passing("step-000002 saved"))
    assert "step-000001 saved" not in drawn(display)
    display.status = lambda: "saving step-000003"
    assert "step-000002 saved" not in drawn(display), "what goes on comes first"
    display.close()
    assert stream.getvalue().rstrip().endswith("step-000002 saved")
    told, lines = plain()
    told.message(Passing("step-000001 saved"))
    assert "step-000001 saved" in written(lines), "a line of its own where nothing is redrawn"


def test_the_live_display_shows_progress_and_the_memory_of_every_rank():
    display, stream = live()
    with display:
        assert display.is_live
        assert "waiting for the first step" in drawn(display)
        display.step(record(5))
        display.evaluation({"step": 5, "eval_loss": 3.25})
        display.message("checkpoint saved")
        text = drawn(display)
    assert "step 5/20" in text
    assert "loss  2.5000  eval loss  3.2500  lr 1.00e-05  grad norm   0.75  targets/s   12,346" in text
    assert re.search(r"king\.local +█{6}░{6} +50% +200 GiB of 400 GiB", text)
    assert re.search(r"soldier-1\.local +█{9}░{3} +75% +156 GiB of 208 GiB", text)
    assert not display.is_live
    output = stream.getvalue()
    assert "checkpoint saved" in output
    assert "\x1b[2K" in output  # redrawn in place
    assert "step 5/20" in output  # what is left on the screen at the end


def test_the_cursor_comes_back_at_once_for_a_killed_rank_cannot_do_it():
    display, stream = live()
    with display:
        output = stream.getvalue()
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")


def test_an_exception_ends_the_live_display_and_closing_twice_is_harmless():
    display, stream = live()
    with pytest.raises(RuntimeError), display:
        raise RuntimeError
    display.close()
    length = len(stream.getvalue())
    display.close()
    assert len(stream.getvalue()) == length


def test_mode_never_stays_plain_on_a_terminal(monkeypatch):
    monkeypatch.setattr(console_module, "terminal_size", lambda _: os.terminal_size((90, 30)))
    stream = io.StringIO()
    assert not RunDisplay(3, [KING], mode="never", stream=stream).is_live
    with RunDisplay(3, [KING], mode="auto", stream=io.StringIO()) as display:
        assert display.is_live


def test_freed_memory_that_is_kept_is_shown_beside_the_peak():
    cached = {"cache_bytes": [3 * GIB, 0]}
    display, stream = plain()
    display.step(record(1, **cached))
    assert "memory 75% (soldier-1.local)" in written(stream)
    display.step(record(2, peak_bytes=[392 * GIB, 1], **cached))
    assert "memory 98% (king.local, 3.00 GiB cached)" in written(stream)
    shown, _ = live()
    with shown:
        shown.step(record(5, **cached))
        assert re.search(r"king\.local .* 200 GiB of 400 GiB, 3\.00 GiB cached", drawn(shown))


def test_slow_work_says_what_it_is_and_fast_work_does_not():
    said: queue.Queue[str] = queue.Queue()
    with said_if_slow("never said", seconds=3600, say=said.put):
        pass
    with said_if_slow("verifying", seconds=0, say=said.put):
        assert said.get(timeout=60) == "verifying"
    assert said.empty()
