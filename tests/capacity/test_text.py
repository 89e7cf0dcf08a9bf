"""The terminal's tables, from made-up reports: bars to scale, letters without colours, nothing lost."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from capacity import made_up
from rich.console import Console

from mlx_empire.capacity.ledger_groups import alike
from mlx_empire.capacity.text import (
    capacity_console,
    print_daughters,
    print_ladder,
    print_matrix,
    print_report,
    stacked_bar,
)
from mlx_empire.report.text import energy, run_length, span

DRAW = {
    "report": (print_report, made_up.report),
    "matrix": (print_matrix, made_up.matrix),
    "ladder": (print_ladder, made_up.ladder),
    "daughters": (print_daughters, made_up.daughters),
}


def drawn(name: str, console: Console | None = None) -> str:
    show, make = DRAW[name]
    stream = io.StringIO()
    show(make(), console or capacity_console(stream))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "report",
            (
                "NO",
                "107,769,861,120",
                "not trainable here",
                "352 GiB",
                "-10.6%",
                "10 GbE",
                "H100",
                "sudo",
                "276 GiB 111 GiB 4 201 GiB",
                "tight",
                "disk=1TB",
                "MLX's cache",
            ),
        ),
        (
            "matrix",
            ("NO 140% over Z3 ≠", "tight 3% free Z3", "180 B", "agrees in 7", "so it fits", "catalog: x"),
        ),
        ("ladder", ("4000 GiB", "+ another", "llama-2-13b", "none")),
        ("daughters", ("242", "QLoRA, 4-bit base", "1.5 to 3.6 h", "mlx-lm has no lora")),
    ],
)
def test_a_file_gets_plain_text_with_everything(name, words):
    text = drawn(name)
    flat = " ".join(text.split())
    for word in words:
        assert word in flat, word
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", sorted(DRAW))
def test_markup_in_names_stays_text(name):
    assert made_up.HOSTILE[:8] in drawn(name) or name == "ladder"


def test_a_terminal_without_unicode_gets_ascii():
    class Ascii(io.StringIO):
        encoding = "ascii"

    stream = Ascii()
    console = Console(file=stream, width=120, no_color=True)
    print_ladder(replace(made_up.ladder(), rungs=made_up.ladder().rungs[:1]), console)
    stream.getvalue().encode("ascii")


def test_a_bar_is_drawn_to_scale_with_the_limit_in_its_place():
    console = capacity_console(io.StringIO())
    node = made_up.node("x", None, 128, 100, "fits", weights=50, gradients=25)
    assert (
        stacked_bar(node, 200 * 2**30, console, width=40).plain
        == "W" * 10 + "G" * 5 + "·" * 5 + "│" + "·" * 20
    )
    over = made_up.node("x", None, 128, 100, "no", weights=150)
    assert stacked_bar(over, 200 * 2**30, console, width=40).plain == "W" * 20 + "│" + "W" * 10 + "·" * 10


def test_nodes_that_are_alike_share_a_column():
    nodes = [
        made_up.node(name, None, 128, limit, "fits", weights=50)
        for name, limit in (("a", 100), ("b", 100), ("c", 90))
    ]
    assert [names for names, _ in alike(nodes)] == ["a +1", "c"]


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ((1.0, 2.5), "1 to 2.5 s"),
        ((3.001, 3.002), "3 s"),
        ((12.34, 123.4), "12.3 to 123 s"),
        ((1, float("inf")), "1 to ? s"),
        ((5000, 12345), "5,000 to 12,345 s"),
    ],
)
def test_spans(pair, said):
    assert span(pair, " s") == said


@pytest.mark.parametrize(
    ("hours", "said"),
    [
        ((0.001, 0.002), "3.6 to 7.2 s"),
        ((0.5, 1.5), "30.0 to 90.0 min"),
        ((1.0, 30.0), "1 to 30.0 h"),
        ((40.0, 96.0), "1.67 to 4 days"),
    ],
)
def test_a_run_is_told_in_the_unit_of_its_length(hours, said):
    assert run_length(hours) == said


def test_little_energy_is_told_in_watt_hours():
    assert energy((0.1, 0.25)) == "100 to 250 Wh"
    assert energy((15.0, 36.0)) == "15.0 to 36.0 kWh"
