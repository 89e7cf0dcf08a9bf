"""The ledger against the peaks of settings that nobody chose: twelve of the benchmark's, those that compute least.

`python benchmarks/ledger_random.py` measures all of them, and any others. Of those with `--otherwise` (running ahead,
packed rows, long ones) twelve are measured in `make test-slow`.
"""

from __future__ import annotations

import json
from functools import cache
from statistics import median
from typing import Any

import pytest
from support.mpi import run_ranks
from support.random_settings import drawn, drawn_otherwise, title

SEED, COUNT, CHOSEN = 13, 60, 12


def work_of(fields: dict[str, Any]) -> int:
    """About what two steps of a setting cost."""
    config = fields["config"]
    hidden = config.get("hidden_size", config.get("n_embd"))
    tokens = fields["rows"] * fields["width"] * fields["micro_batches"]
    slow = 20 if fields["dtype"] == "bfloat16" else 1
    return int(tokens * hidden * (config.get("intermediate_size", hidden) + config["vocab_size"]) * slow)


@cache
def reports(otherwise: bool = False) -> dict[str, dict[str, Any]]:
    """What was predicted and measured, by setting."""
    settings = drawn_otherwise(SEED, COUNT) if otherwise else drawn(SEED, COUNT)
    alone = sorted((fields for ranks, fields in settings if ranks == 1), key=work_of)
    cases = {title(1, fields): fields for fields in alone[:CHOSEN]}
    (report,) = run_ranks(1, "tests/engine/peak_worker.py", [json.dumps(cases)], timeout=900)
    return {name: report[name] for name in cases}


def errors(otherwise: bool = False) -> dict[str, float]:
    """By setting the prediction over the measurement, minus one."""
    found = {name: one["predicted"] / one["measured"] - 1 for name, one in reports(otherwise).items()}
    for name, error in found.items():
        print(f"{100 * error:+.1f} %  {name}")
    return found


def test_no_prediction_is_more_than_five_percent_over_or_one_under():
    assert all(-0.01 <= error <= 0.05 for error in errors().values()), errors()


def test_the_median_is_within_one_and_a_half_percent():
    assert median(map(abs, errors().values())) <= 0.015


def test_they_are_of_many_families():
    assert len({name.split(":")[0] for name in errors()}) >= 7


@pytest.mark.slow
def test_nor_are_they_for_packed_rows_long_ones_and_a_thread_that_runs_ahead():
    """Running ahead, the update's bytes are those that may be under way: how many are is chance."""
    found, measured = errors(otherwise=True), reports(otherwise=True)
    assert min(found.values()) >= -0.01, found
    bounded = [n for n in found if not ("run_ahead" in n and measured[n]["phase"] == "update")]
    assert all(found[n] <= 0.05 for n in bounded), found
    assert median(abs(found[n]) for n in bounded) <= 0.015, found
    assert {way for way in ("run_ahead", "packed", "by_pattern") if any(way in n for n in bounded)} == {
        *("run_ahead", "packed", "by_pattern")
    }
