"""The documents' numbers beside ours: the sums of both by hand, the page, and what a user types."""

from __future__ import annotations

import inspect
import json
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_empire import cli
from mlx_empire.claims.assumed import machine
from mlx_empire.claims.judge import FILE, TO_MEASURE, Claim, Judged, Ours, claims
from mlx_empire.claims.page import first_decision
from mlx_empire.claims.questions import QUESTIONS
from mlx_empire.cluster.hostfile import default_limit
from mlx_empire.cluster.machine import OWN_MEMORY_USABLE
from mlx_empire.sizes import GIB

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "claims.md"


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, object]]:
    assert cli.main(["claims", *words, "--json"]) == 0
    return list(json.loads(capsys.readouterr().out))


def test_the_functions_of_the_second_document_return_what_they_say_when_run(capsys) -> None:
    """Its text says 27.6 and 11.8 GB; the sums here are written out from its own definitions."""
    lora, qlora = asked(capsys, "Appendix B")
    adapters = 2 * 50 * 16 * 4096 * 2 * 7 / 1e9
    kept = (2048 * 4096 * 50 * 2 / 4 + 2 * 2048 * 50 * 4096 * 2) / 1e9
    assert lora["ours"] == pytest.approx(7e9 * 2 / 1e9 + 4 * adapters + kept + 3)
    assert qlora["ours"] == pytest.approx(7e9 * 0.5 / 1e9 + 0.4 + 3 * adapters + kept + 1.5)
    assert (round(float(str(lora["ours"])), 2), round(float(str(qlora["ours"])), 2)) == (19.25, 7.56)
    assert str(lora["verdict"]).startswith("differs")


def test_counts_that_need_no_plan_are_those_of_the_hand(capsys) -> None:
    by_name = {one["what"]: one["ours"] for one in asked(capsys, "two RTX 4090")}
    assert by_name == {"memory of two RTX 4090": 48}
    (steps,) = asked(capsys, "two epochs")
    assert steps["ours"] == 18  # 17.5 steps
    (installed,) = asked(capsys, "Hardware configurations")
    assert installed["ours"] == pytest.approx((512 + 3 * 256) * 2**30 / 1e12)
    (adapters,) = asked(capsys, "Key techniques, LoRA")
    each_layer = 4 * (4096 + 4096) + 3 * (4096 + 11008)
    assert adapters["ours"] == pytest.approx(32 * 16 * each_layer / 1e6)
    slow, fast = asked(capsys, "at 50 to 80 tokens")[0]["ours"]  # type: ignore[misc]
    assert (slow, fast) == pytest.approx((1e5 / 80 / 3600, 1e5 / 50 / 3600))


def test_what_an_8_bit_optimizer_saves_is_counted_with_the_masters(capsys) -> None:
    (saved,) = asked(capsys, "8-bit states save of")
    narrow, wide = (
        1 + 1 + 5 / 64 + 2,
        4 + 4 + 2,
    )  # two codes, five bytes a block of 64, the master's other half
    assert saved["ours"] == pytest.approx(100 * (1 - narrow / wide), abs=0.01)


def test_every_claim_has_a_place_and_asks_what_can_be_answered() -> None:
    rows = tomllib.loads(FILE.read_text())["claim"]
    assert len(rows) >= 40
    assert [row["document"] for row in rows] == sorted(row["document"] for row in rows)
    for row, claim in zip(rows, claims(), strict=True):
        assert set(row) <= {"document", "place", "what", "theirs", "unit", "ask", "with", "why"}
        assert claim.place
        inspect.signature(QUESTIONS[claim.ask]).bind(**claim.settings)


def test_the_page_has_a_line_for_each_claim_in_their_order() -> None:
    lines = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ", PAGE.read_text(), re.M)
    told = [line for line in lines if line[0] not in ("place", "---|---")]
    assert told == [(claim.place, claim.what) for claim in claims()], "run make claims"


def test_a_stage_is_a_word_of_which_no_ratio_is_told() -> None:
    """Stage 3 is not 1.5 times stage 2."""
    assert all(isinstance(claim.theirs, str) for claim in claims() if claim.ask == "stage")
    assert "| stage 2 | stage 3 | differs | " in PAGE.read_text()


def test_what_is_computed_stands_in_no_sentence() -> None:
    """Of the page: no quantity of a claim's `why` is one of ours, which the next plan may change."""
    quantity = re.compile(r"[\d.,]*\d (?:[A-Z]?B|seconds|hours|dollars|models|steps|times)\b")
    lines = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    by_claim = {(cells[0].removeprefix("| "), cells[1]): cells for cells in lines}
    for claim in claims():
        cells = by_claim[claim.place, claim.what]
        formula = cells[5].removesuffix(" |").removesuffix(claim.why)
        ours = set(quantity.findall(f"{cells[3]} {formula}"))
        assert not ours & set(quantity.findall(claim.why)), claim.what


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("yes", "that it fits, holds. "),
        ("tight", "holds, tightly. "),
        ("no", "that it fits, does not hold. "),
    ],
)
def test_the_page_says_of_the_first_decision_what_was_computed(answer: str, told: str) -> None:
    claim = Claim("S0", "verdict", "it fits", "yes", "", "fit_verdict", {}, "")
    other = Claim("S0", "matrix", "another", "yes", "", "fit_verdict", {"model": "falcon-180b"}, "")
    judgements = [Judged(other, Ours("no", "")), Judged(claim, Ours(answer, ""))]
    assert first_decision(judgements).endswith(told)
    assert first_decision(judgements[:1]) == "", "which was not asked for"


def test_a_machine_is_a_mac_or_not_as_the_plan_knows_chips() -> None:
    mac, card = machine(16, "Apple M4"), machine(16, "M40")
    assert mac.limit_bytes == default_limit(16 * GIB)
    assert card.limit_bytes == int(OWN_MEMORY_USABLE * 16 * GIB)


@pytest.mark.slow
def test_the_page_is_what_the_command_computes(capsys) -> None:
    assert cli.main(["claims", "--markdown"]) == 0
    assert capsys.readouterr().out == PAGE.read_text(), "run make claims"


def test_a_word_that_is_in_no_claim_is_refused_in_a_line(capsys) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["claims", "unicorn"])
    assert left.value.code == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert "unicorn: is in no claim; name a document, S0 or S1" in line


def judged(theirs: object, ours: object) -> str:
    claim = Claim("S0", "somewhere", "something", theirs, "GB", "total", {}, "")  # type: ignore[arg-type]
    return Judged(claim, Ours(ours, "")).verdict  # type: ignore[arg-type]


NUMBERS = st.floats(0.001, 1e6)


@given(NUMBERS, NUMBERS)
def test_numbers_are_judged_by_how_many_times_they_are_apart(theirs: float, ours: float) -> None:
    word, _, times = judged(theirs, ours).partition(": ")
    apart = max(theirs, ours) / min(theirs, ours)
    assert word == ("agrees" if apart <= 1.15 else "near" if apart <= 1.35 else "differs")
    assert word == judged(ours, theirs).partition(": ")[0]
    if times:
        assert float(times.removesuffix(" x")) == pytest.approx(ours / theirs, rel=0.01)


@given(NUMBERS, st.floats(1, 10), st.floats(1, 10))
def test_ranges_that_meet_agree(low: float, first: float, second: float) -> None:
    assert judged((low, low * first), (low, low * second)) == "agrees"
    assert judged(low, (low / second, low * second)) == "agrees"


def test_words_agree_or_not_and_what_is_to_be_measured_is_neither() -> None:
    assert judged("yes", "yes") == "agrees"
    assert judged("tight", "no") == judged("yes", "tight") == "differs"
    assert judged("<0.1 %", TO_MEASURE) == TO_MEASURE
    assert judged((0.0, 0.0), 5.0) == "differs"
