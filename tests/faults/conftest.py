"""The lab, and the run that nothing happened to. What became of each fault is left in build/faults.json."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from support.fault_table import EVENTS
from support.faults import Lab, Result, succeeded


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Runs of the tiny model, each rank with a checkpoint folder of its own."""
    made = Lab.at(tmp_path_factory.mktemp("lab"))
    succeeded(made.train("base"))
    assert made.committed("base") == [3, 6, 9, 12]
    yield made
    EVENTS.parent.mkdir(exist_ok=True)
    EVENTS.write_text(json.dumps([vars(event) for event in made.events], indent=1) + "\n")


@pytest.fixture(scope="session")
def base(lab: Lab) -> Result:
    """What every run must come to."""
    return lab.result("base")
