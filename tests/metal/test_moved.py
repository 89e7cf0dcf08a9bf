"""How many bytes pass through the optimizer's kernels: it may only fall."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.watching import library, watched

WORKER = Path(__file__).with_name("moved.py")
# They compute nothing: what comes out is what goes in, seen otherwise.
VIEWS = ("View", "Slice", "Broadcast", "Reshape", "ExpandDims", "Squeeze")
MOST = {"exact": 73.5, "diet": 87.5}  # bytes a parameter, where 102 and 120 were
KERNELS = {"exact": 13, "diet": 15}  # that go through rows, or an eighth of them


@pytest.fixture(scope="module")
def updates(request: pytest.FixtureRequest) -> dict[str, dict]:
    built = library(request.config.cache.mkdir("watch"))
    return {one["master"]: one for one in map(json.loads, watched(built, [str(WORKER)]).splitlines())}


@pytest.mark.parametrize("master", list(MOST))
def test_an_8_bit_update_moves_no_more_than_it_did(updates, master):
    found = updates[master]
    elements = found["elements"]
    computing = [kind for kind in found["kinds"] if kind["primitive"].split()[0] not in VIEWS]
    moved = sum(kind["bytes"] for kind in computing)
    assert found["must"] < moved <= MOST[master] * elements
    wide = sum(kind["count"] for kind in computing if kind["bytes"] >= elements * kind["count"] / 4)
    assert 0 < wide <= KERNELS[master]
