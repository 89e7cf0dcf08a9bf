"""The ledger against the peaks of settings that nobody chose: twelve of the benchmark's, those that compute least.

`python benchmarks/ledger_random.py` measures all of them, and any others.
"""

from __future__ import annotations

import json
from functools import cache
from statistics import median
from typing import Any

from support.mpi import run_ranks
from support.random_settings import drawn, title

SEED, COUNT, CHOSEN = 13, 60, 12


def work_of(fields: dict[str, Any]) -> int:
    """About what two steps of a setting cost."""
    config = fields["config"]
    hidden = config.get("hidden_size", config.get("n_embd"))
    tokens = fields["rows"] * fields["width"] * fields["micro_batches"]
    slow = 20 if fields["dtype"] == "bfloat16" else 1
    return int(tokens * hidden * (config.get("intermediate_size", hidden) + config["vocab_size"]) * slow)


@cache
def errors() -> dict[str, float]:
    """By setting the prediction over the measurement, minus one."""
    alone = sorted((fields for ranks, fields in drawn(SEED, COUNT) if ranks == 1), key=work_of)
    cases = {title(1, fields): fields for fields in alone[:CHOSEN]}
    (report,) = run_ranks(1, "tests/engine/peak_worker.py", [json.dumps(cases)], timeout=600)
    return {name: report[name]["predicted"] / report[name]["measured"] - 1 for name in cases}


def test_no_prediction_is_more_than_five_percent_over_or_one_under():
    for name, error in errors().items():
        print(f"{100 * error:+.1f} %  {name}")
    assert all(-0.01 <= error <= 0.05 for error in errors().values()), errors()


def test_the_median_is_within_one_and_a_half_percent():
    assert median(map(abs, errors().values())) <= 0.015


def test_they_are_of_many_families():
    assert len({name.split(":")[0] for name in errors()}) >= 7
