import json
from xml.etree import ElementTree

import pytest

from mlx_empire.errors import UserError
from mlx_empire.report.picture import MAX_POINTS, TOP, loss_picture, main, smoothed, thinned, ticks

SVG = "{http://www.w3.org/2000/svg}"
RECORDS = [
    {"step": 0, "eval_loss": 4.0},
    {"step": 1, "loss": 4.0},
    {"step": 2, "loss": None},
    {"step": 3, "loss": 3.0},
    {"step": 4, "loss": 2.0},
    {"step": 4, "eval_loss": 2.5},
]


def curves(picture: str) -> list[list[tuple[float, float]]]:
    lines = ElementTree.fromstring(picture).findall(f"{SVG}polyline")
    return [[tuple(map(float, point.split(","))) for point in line.get("points").split()] for line in lines]


def raw(records: list[dict[str, float | None]]) -> list[list[tuple[float, float]]]:
    """The faint curves of each step's loss."""
    groups = ElementTree.fromstring(loss_picture(records, "x")).findall(f"{SVG}g[@opacity]")
    return [one for group in groups for one in curves(ElementTree.tostring(group, encoding="unicode"))]


def test_each_steps_loss_is_faint_behind_its_running_mean():
    means = [4.0, (0.9 * 4 + 3) / 1.9, (0.81 * 4 + 0.9 * 3 + 2) / 2.71]
    assert [y for _, y in smoothed([(1, 4.0), (2, 3.0), (3, 2.0)])] == pytest.approx(means)
    steps = [{"step": n, "loss": 3.0 + n % 2} for n in range(1, 40)]
    (zigzag,), (mean,) = raw(steps), curves(loss_picture(steps, "x"))
    assert len(zigzag) == len(mean) == 39
    assert abs(mean[30][1] - mean[31][1]) < 0.2 * abs(zigzag[30][1] - zigzag[31][1])


def test_both_axes_have_a_name_and_no_name_of_a_curve_lies_on_the_drawing():
    texts = {t.text: t for t in ElementTree.fromstring(loss_picture(RECORDS, "x")).iter(f"{SVG}text")}
    assert {"step", "loss", "training loss, smoothed", "loss on held-out text", "x"} <= texts.keys()
    assert all(float(texts[name].get("y") or 99) < TOP for name in ("training loss, smoothed", "x"))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (1.93, 4.1, [2, 2.5, 3, 3.5, 4]), (0, 1200, [0, 500, 1000]), (3, 3, [3])],
)
def test_ticks_are_round_numbers_inside(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_both_losses_are_drawn_to_one_scale():
    (train,), (_, held_out) = raw(RECORDS), curves(loss_picture(RECORDS, "runs/<x>"))
    assert len(train) == 3  # the step without a loss is left out
    assert len(held_out) == 2
    (x1, y1), (x3, y3), (x4, y4) = train
    assert x3 - x1 == pytest.approx(2 * (x4 - x3), abs=0.2)  # steps 1, 3, 4
    assert y3 - y1 == pytest.approx(y4 - y3, abs=0.2)  # losses 4, 3, 2
    assert y1 < y3 < y4  # a falling loss falls on paper: y grows downwards
    assert held_out[0][1] == y1
    assert held_out[1] == pytest.approx((x4, (y3 + y4) / 2), abs=0.2)


def test_a_dark_page_shows_a_dark_picture() -> None:
    picture = loss_picture(RECORDS, "x")
    assert "prefers-color-scheme: dark" in picture
    assert 'fill="white"' not in picture
    assert "training loss" in loss_picture(RECORDS[1:5], "x"), "also without held-out text there is a legend"


def test_a_long_run_is_thinned_to_means():
    assert thinned([(i, 2.0 * i) for i in range(2 * MAX_POINTS)])[:2] == [(0.5, 1.0), (2.5, 5.0)]
    assert len(thinned([(i, 1.0) for i in range(2 * MAX_POINTS + 1)])) <= MAX_POINTS
    assert thinned([]) == []


def test_one_step_alone_is_a_picture_and_none_is_a_users_error():
    assert len(curves(loss_picture([{"step": 1, "loss": 3.0}], "x"))) == 1
    with pytest.raises(UserError, match="no finite loss"):
        loss_picture([{"step": 1, "loss": None}], "x")


def test_a_run_is_called_by_its_folders_name_from_wherever_it_is_drawn(tmp_path, monkeypatch):
    (tmp_path / "mine" / "final").mkdir(parents=True)
    (tmp_path / "mine" / "metrics.jsonl").write_text(json.dumps(RECORDS[1]) + "\n")
    monkeypatch.chdir(tmp_path / "mine" / "final")
    assert main(["..", "loss.svg"]) == 0
    texts = {t.text for t in ElementTree.parse("loss.svg").iter(f"{SVG}text")}
    assert "mine" in texts


def test_the_command(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    assert main([str(tmp_path)]) == 0
    assert len(curves((tmp_path / "loss.svg").read_text())) == 2
    assert main([str(tmp_path / "nowhere")]) == 64
    assert main([]) == 64
    assert len(capsys.readouterr().err.splitlines()) == 2
