"""The audit's arithmetic, and that it catches a technique that changes bits."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from mlx_empire.recipe.changes import value
from mlx_empire.recipe.load import parse_recipe
from mlx_empire.verify.fidelity import PLAIN, Finding, Outcome, Pair, audit, pairs_of
from mlx_empire.verify.page import FidelityReport, fidelity_document, fidelity_page, rows

TEXT = """
model: {path: m}
data: {path: d, sequence_length: 16}
batch: {global_size: 8}
optimizer: {learning_rate: 1e-5, state_bits: 8}
run: {dir: r, steps: 10}
"""
ONE = Outcome((3.0, 2.0), 2.0, "a")


def finding(identical: bool, *tried: Outcome) -> Finding:
    return Finding(Pair("it", {}, identical), (ONE,) * len(tried), tried)


def test_difference_and_standard_error_are_over_seeds():
    found = finding(
        False, replace(ONE, held_out=2.02), replace(ONE, held_out=2.04), replace(ONE, held_out=2.06)
    )
    assert found.difference == pytest.approx(0.02)
    assert found.standard_error == pytest.approx(0.01 / 3**0.5)
    assert finding(False, ONE).standard_error is None


def test_same_bits_means_losses_and_weights_of_every_seed():
    assert finding(True, ONE, ONE).same
    assert not finding(True, ONE, replace(ONE, digest="b")).same
    assert not finding(True, ONE, replace(ONE, losses=(3.0, 2.0000000000000004))).same


def test_without_validation_data_the_last_quarter_counts():
    assert Outcome((5.0, 4.0, 3.0, 2.0, 1.0, 1.0, 0.5, 0.25), None, "a").judged == pytest.approx(0.375)


def test_every_pair_is_run_from_the_plain_settings_and_equal_runs_once():
    asked = []

    def run(recipe, moved):
        asked.append(({key: value(recipe, key) for key in PLAIN}, recipe.run.seed, moved))
        return ONE

    pairs = [Pair("noise", {}, False, moved=True), Pair("bits", {"optimizer.state_bits": 8}, False)]
    pairs.append(Pair("again", {"optimizer.state_bits": 8}, False))
    audit(parse_recipe(TEXT, "x.yaml"), pairs, [4, 5], run, lambda text: None)
    assert len(asked) == 6
    assert [(settings["optimizer.state_bits"], seed, moved) for settings, seed, moved in asked] == [
        (32, 4, False),
        (32, 5, False),
        (32, 4, True),
        (32, 5, True),
        (8, 4, False),
        (8, 5, False),
    ]


def test_a_changed_bit_is_marked_everywhere():
    wrong = replace(ONE, digest="b")
    found = FidelityReport("m<1>", "w", [finding(True, wrong)], {"it": 2**30})
    assert found.failed == ["it"]
    (technique,) = fidelity_document(found)["techniques"]
    assert (technique["must_be_identical"], technique["identical"]) == (True, False)
    assert "different bits ✗" in rows(found)[0]
    html = fidelity_page(found)
    assert "changed bits that they must not" in html
    assert "m&lt;1&gt;" in html
    assert "the same bits, the weights are not" in html
    assert html.count("<polyline") == 0
    assert FidelityReport("m", "w", [finding(True, ONE)], {}).failed == []


def test_the_page_draws_how_far_losses_are_apart_and_says_where_no_bit_differs():
    near, far = (3.0, 2.0, 1.0), (3.0, 2.002, 1.0)
    other = finding(False, replace(ONE, losses=far), replace(ONE, losses=far))
    other = replace(other, plain=(replace(ONE, losses=near), replace(ONE, losses=(3.3, 2.2, 1.1))))
    html = fidelity_page(FidelityReport("m", "w", [other], {}))
    assert html.count("<polyline") == 3, "a line a seed, and the spread between the seeds"
    assert "seed 1 from 0.001 to 0.001" in html, "one step, by a thousandth"
    assert 'name="viewport"' in html
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)|<script|<img", html)
    same = replace(finding(True, ONE), plain=(ONE,))
    html = fidelity_page(FidelityReport("m", "w", [same], {}))
    assert f"0 bits differ in {len(ONE.losses)} steps of 1 seed." in html
    assert "<polyline" not in html


def test_losses_that_are_not_finite_are_told_and_not_drawn():
    nan, inf = float("nan"), float("inf")
    plain = (Outcome((3.0, 2.0, 1.0), 1.0, "a"), Outcome((3.3, nan, inf), nan, "a"))
    tried = (Outcome((3.0, 2.002, 1.0), 1.0, "b"), Outcome((3.3, nan, 1.0), 1.0, "b"))
    found = Finding(Pair("it", {}, True), plain, tried)
    report = FidelityReport("m", "w", [found], {})
    html = fidelity_page(report)
    assert "1 of 6 losses are not finite" in html
    assert "seed 1 from 0.001 to 0.001" in html
    points = re.findall(r'points="([^"]*)"', html)
    assert points
    assert not any("nan" in one or "inf" in one for one in points)
    assert rows(report)[0][3:5] == ("+nan %", "nan %")
    (technique,) = json.loads(json.dumps(fidelity_document(report), allow_nan=False))["techniques"]
    assert (technique["difference"], technique["curves"]["plain"][1]) == (None, [3.3, None, None])
    lost = Finding(found.pair, (Outcome((nan,), None, "a"),), (Outcome((1.0,), None, "a"),))
    html = fidelity_page(FidelityReport("m", "w", [lost], {}))
    assert "1 of 1 losses are not finite" in html
    assert "<polyline" not in html


def test_two_runs_that_lose_their_numbers_alike_are_the_same_bits():
    lost = [Outcome((3.0, float(word)), None, "a") for word in ("nan", "nan")]
    assert Finding(Pair("it", {}, True), (lost[0],), (lost[1],)).same


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_that_is_computed_in_is_a_technique_of_its_own(dtype):
    recipe = parse_recipe(TEXT, "x", ["optimizer.state_bits=32", f"model.dtype={dtype}"])
    shards = SimpleNamespace(zero_stage=0, units=(), world_size=1)
    plan = SimpleNamespace(shards=shards, work=SimpleNamespace(gradient_dtype="float32", unrecomputed=0))
    found = [pair for pair in pairs_of(recipe, plan, dtype) if not pair.identical]
    said = [pair.changes.get("model.dtype", "float32") for pair in found]
    assert said == ["float32", *[dtype] * (dtype != "float32"), dtype]
