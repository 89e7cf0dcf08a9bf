"""The figures of chips against what is known elsewhere of them, and which chip a node is told to have."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_empire.cluster.hostfile import Node
from mlx_empire.cluster.machine import Calibration
from mlx_empire.plan.chips import (
    chip_named,
    chip_of,
    chips,
    is_mac,
    known_speed,
    no_time,
    on_cpu,
    plain_name,
    price_of,
)
from mlx_empire.sizes import GIB

GIGA = 10**9


def node(
    chip: str | None = None, role: str | None = None, memory: int = 64 * GIB, measured: bool = True
) -> Node:
    return Node("a", 1, role, memory, memory // 2, None, chip, measured=measured)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (node("Apple M3 Ultra"), "M3 Ultra"),
        (node("M3-Ultra"), "M3 Ultra"),
        (node("Apple M4 Max"), "M4 Max"),
        (node("M4"), "M4"),
        (node(role="king"), "M3 Ultra"),
        (node(memory=512 * GIB), "M3 Ultra"),
        (node(), "CPU"),
        (node("cpu", measured=False), "CPU"),
        (node("NVIDIA GeForce RTX 3090"), "RTX 3090"),
        (node("rtx3090"), "RTX 3090"),
        (node("NVIDIA A100-SXM4-80GB"), "A100"),
        (node("NVIDIA H100 80GB HBM3"), "H100"),
        (node("NVIDIA A10G"), "A10G"),
    ],
)
def test_a_node_names_its_chip_or_is_told_by_its_memory(given: Node, name: str) -> None:
    chip = chip_of(given)
    assert chip is not None
    assert chip.name == name
    assert no_time([given]) is None


@pytest.mark.parametrize(
    "written", ["Apple M9", "RTX 3090 Ti", "M3 Extreme", "RTX-5090", "A1000", "Radeon", "GPU"]
)
def test_of_a_chip_that_is_not_in_the_file_nothing_is_known(written: str) -> None:
    unknown = node(written)
    assert chip_of(unknown) is None
    assert price_of(unknown) is None
    assert known_speed([node("M4"), unknown]) is None
    assert no_time([node("M4"), unknown]) == (
        f"no time: unknown chip {written} of a: add it to plan/chips.toml of mlx_empire, or measure it with "
        "--calibrate on a"
    )
    nameless = node(measured=False)
    assert chip_of(nameless) is None
    assert "no chip is named for a: write chip=" in (no_time([nameless]) or "")


def test_macs_are_known_also_where_their_chip_is_not() -> None:
    macs = [node("Apple M9"), node("m4-max"), node(role="soldier"), node("Apple Paravirtual device")]
    others = [node(), node("RTX-3090"), node(measured=False), node("MI300X"), node("Tesla-M40"), node("M60")]
    assert [is_mac(one) for one in (*macs, *others)] == [True] * 4 + [False] * 6
    assert [on_cpu(one) for one in (*macs, *others)] == [False] * 4 + [True, False, True, False, False, False]


def test_every_figure_says_where_it_is_from_and_stands_in_order() -> None:
    for chip in chips().values():
        assert chip.mark in ("measured", "reported", "planned")
        assert chip.source
        for low, high in (chip.tflops, chip.memory_rate, chip.disk_rate, chip.rent or (1, 1)):
            assert 0 < low <= high
        assert {size for size, _ in chip.prices} <= set(chip.memory)


def test_the_families_are_whole() -> None:
    apple = {f"m{n}{kind}" for n in range(1, 6) for kind in ("", "pro", "max")} | {
        "m1ultra",
        "m2ultra",
        "m3ultra",
    }
    assert set(chips()) == apple | {"rtx3060", "rtx3090", "rtx4090", "a10g", "a100", "h100", "cpu"}
    for name, chip in chips().items():
        assert plain_name(chip.name) == name


def test_what_the_file_leaves_out_is_scaled_from_what_is_known() -> None:
    assert chip_named("M3 Ultra").tflops == (5, 12)
    assert chip_named("M4 Max").tflops == (2.5, 6.0), "half of the M3 Ultra's 80 cores"
    assert chip_named("M4 Max").memory_rate == (546 * GIGA / 4, 546 * GIGA)
    assert chip_named("A100").tflops == pytest.approx((320 * 312 / 989, 448 * 312 / 989))
    assert chip_named("CPU").tflops == (0.002, 0.12)


def test_a_calibration_replaces_the_figures_of_its_own_chip_and_is_all_that_is_known_of_a_new_one() -> None:
    measured = Calibration("here", "Apple M3 Ultra", "bfloat16", 9.0, 6e11)
    ultra = chip_of(node(role="king"), measured)
    assert ultra is not None
    assert ultra.tflops == pytest.approx((8.1, 9.9))
    assert (ultra.mark, ultra.watts) == ("measured", 270)
    assert chip_of(node(), measured) == chip_named("CPU")
    cpu = chip_of(node(), Calibration("here", None, "float32", 0.05, 1e10))
    assert cpu is not None
    assert cpu.tflops == pytest.approx((0.045, 0.055))
    new = replace(measured, chip="Apple M9 Max")
    assert no_time([node("Apple M9 Max")], new) is None
    found = chip_of(node("Apple M9 Max"), new)
    assert found is not None
    assert (found.tflops, found.watts) == (pytest.approx((8.1, 9.9)), None)
    assert no_time([node("Apple M9")], new) is not None


def test_prices_are_of_the_memory_that_was_bought() -> None:
    assert price_of(node("M3-Ultra", memory=512 * GIB)) == 11_699
    assert price_of(node("M3-Ultra", memory=64 * GIB)) is None
    assert (
        price_of(node("RTX-3090", memory=24 * GIGA)) == price_of(node("RTX-3090", memory=24 * GIB)) == 1_499
    )


@given(
    st.sampled_from([chip.name for chip in chips().values()]),
    st.sampled_from(["{}", "Apple {}", "NVIDIA {}"]),
)
def test_spaces_hyphens_case_and_the_vendor_do_not_matter(name: str, written: str) -> None:
    for spelled in (written.format(name), written.format(name).lower(), name.replace(" ", "-"), name.upper()):
        assert chip_of(node(spelled)) == chip_named(name)
