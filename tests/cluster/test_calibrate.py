"""The calibration measures something plausible, quickly, and counts operations as one does by hand."""

import time

import pytest

from mlx_empire.cluster import machine as module
from mlx_empire.cluster.machine import calibrate, layer_flops


def test_operations_of_the_measured_layer():
    """Seven products forward, twice as much backward; scores and mix of all positions, masked ones too."""
    tokens, width = 256, 128
    products = 4 * width * width + 3 * width * (3 * width)
    assert layer_flops(tokens, width) == 3 * (2 * tokens * products + 2 * 2 * tokens * tokens * width)


def test_a_short_measurement(monkeypatch):
    monkeypatch.setattr(module, "LONG_ENOUGH", 0.005)
    monkeypatch.setattr(module, "COPY_ELEMENTS", 1 << 20)
    started = time.perf_counter()
    found = calibrate("float32")
    assert time.perf_counter() - started < 30
    assert 1e-4 < found.tflops < 1e3
    assert 1e7 < found.memory_rate < 1e13
    assert found.dtype == "float32"
    assert found.machine


def test_the_quickest_call_counts_and_the_first_does_not():
    pauses = iter([0.2, 0.03, 0.01, 0.02])
    assert module._best(lambda: time.sleep(next(pauses))) == pytest.approx(0.01, abs=0.008)
