"""A run on mixed sources that is killed goes on to the bits of one that was not, on other ranks too."""

from __future__ import annotations

import json

import pytest
from support.faults import Lab, succeeded

SOURCES = "data.sources=[{path: rows.jsonl, weight: 2, to: 0.75}, {path: late.jsonl, from: 0.25}]"


@pytest.mark.faults
def test_a_killed_mixture_comes_to_the_same(lab: Lab) -> None:
    rows = ({"tokens": [(n * 31 + k) % 512 for k in range(12 + n)]} for n in range(17))
    (lab.folder / "late.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["data.path=null", SOURCES]
    succeeded(lab.train("whole-mixture", *asked))
    whole = lab.result("whole-mixture")
    assert lab.train("mixture", *asked, fault="rank=1;step=5;phase=backward;action=kill").code != 0
    assert lab.committed("mixture") == [3]
    lab.copy("mixture", "alone", [3])
    lab.bring_together("alone", 2)
    assert succeeded(lab.train("mixture", *asked)).resumed == 3
    assert lab.result("mixture").after(3) == whole.after(3)
    assert succeeded(lab.train("alone", *asked, ranks=1)).resumed == 3
    assert lab.result("alone").after(3) == whole.after(3)
