"""The lab, and the run that nothing happened to."""

from __future__ import annotations

import pytest
from support.faults import Lab, Result, succeeded


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Runs of the tiny model, each rank with a checkpoint folder of its own."""
    made = Lab.at(tmp_path_factory.mktemp("lab"))
    succeeded(made.train("base"))
    assert made.committed("base") == [3, 6, 9, 12]
    return made


@pytest.fixture(scope="session")
def base(lab: Lab) -> Result:
    """What every run must come to."""
    return lab.result("base")
