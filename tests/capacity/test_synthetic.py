"""`capacity --synthetic` as a user types it: tokens, memory and days of three intentions, with sums by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.planning import assess, llama_like, node_of, recipe_of

from mlx_empire.capacity.synthetic import budget, synthetic
from mlx_empire.errors import UserError
from mlx_empire.plan.agreement import agreement
from mlx_empire.plan.chips import TERA, chip_named
from mlx_empire.plan.hardware import WIRES
from mlx_empire.plan.intentions import INTENTIONS, compute_hours, steps_of_tokens, tflops_asked

ROOT = Path(__file__).resolve().parents[2]
MODEL = "model.path=llama-3.2-1b", "model.dtype=bfloat16", "memory.gradient_dtype=bfloat16"
ROWS = "data.sequence_length=2048", "batch.global_size=8", "optimizer.state_bits=8", "memory.zero_stage=auto"
STUDIO = "studio slots=1 # memory=256GiB chip=M3-Ultra"
ONTOLOGY = "ontology override"
LAYERS, EMBEDDING = 973_146_112, 128_256 * 2048  # parameters of Llama 3.2 1B; the embedding is its head too
# Per layer: queries and output, keys and values, and three matrices between 2,048 and 8,192.
WIDTHS = 2 * (2048 + 2048) + 2 * (2048 + 512) + 3 * (2048 + 8192)
LENGTHS = st.floats(1, 1e6)


@pytest.fixture
def rows(say, recipe, hosts):
    """The rows by intention, on these machines."""

    def of(machine: str, *words: str) -> tuple[dict[str, Any], dict[str, Any]]:
        found = say(recipe, "--synthetic", "--json", "--hosts", hosts(machine), *MODEL, *ROWS, *words)
        assert (found.code, found.err) == (0, "")
        return found.json, {row["intention"]: row for row in found.json["intentions"]}

    return of


def test_the_document_s_table_stands_beside_ours(rows) -> None:
    """Its numbers as they were written, and our verdict on them by hand."""
    _, found = rows(STUDIO)
    told = {
        name: (row["tokens"], row["document"]["hours"], row["document"]["gigabytes"])
        for name, row in found.items()
    }
    assert told == {
        "command tuning": ([1e8, 1e8], [2, 4], [10, 16]),
        "structural redirection": ([1e9, 1e9], [12, 18], [24, 48]),
        ONTOLOGY: ([1e10, 2e10], [72, 120], [80, 96]),
    }
    assert [(row["tuning"], row["rank"]) for row in found.values()] == [
        ("lora", 16),
        ("lora", 64),
        ("full", None),
    ]
    override = found[ONTOLOGY]
    times = 24 * override["days"][0] / 120
    assert override["document"]["time_verdict"] == f"differs: {times:.3g} x"
    assert "10 to 20 B x" in override["why"]
    assert "most of a step: compute" in override["why"]


@pytest.mark.parametrize(("name", "rank"), [("command tuning", 16), ("structural redirection", 64)])
def test_adapters_take_tokens_times_operations_over_the_rate(rows, name: str, rank: int) -> None:
    """Forward, gradient by the input and recomputation of each layer, 2 operations a weight; the head once less, and
    adapters also the gradient by their weights. Attention is what is left: below a tenth at 2,048 positions."""
    _, found = rows(STUDIO)
    adapters = 16 * rank * WIDTHS
    operations = 6 * LAYERS + 4 * EMBEDDING + 8 * adapters
    assert operations == pytest.approx(found[name]["operations_per_token"], rel=0.1)
    tokens = 1e8 if name == "command tuning" else 1e9
    for days, tflops in zip(found[name]["days"], reversed(chip_named("M3-Ultra").tflops), strict=True):
        assert days == pytest.approx(tokens * operations / (tflops * TERA) / 86400, rel=0.15)
    assert found[name]["steps"] == [-(-int(tokens) // (8 * 2048))] * 2


def test_all_weights_take_the_more_days_for_the_more_tokens_and_hold_states(rows) -> None:
    _, found = rows(STUDIO)
    row, parameters = found[ONTOLOGY], LAYERS + EMBEDDING
    slow, fast = chip_named("M3-Ultra").tflops
    for days, tokens, tflops in zip(row["days"], (1e10, 2e10), (fast, slow), strict=True):
        assert days == pytest.approx(tokens * 8 * parameters / (tflops * TERA) / 86400, rel=0.15)
    (node,) = row["nodes"]
    assert node["peak_bytes"] > (2 + 2 + 2 + 2) * parameters, (
        "weights, gradients, their other half, two codes"
    )
    assert row["steps"] == [610_352, 1_220_704]


def test_several_machines_share_what_one_could_not_hold(say) -> None:
    """Scout on the empire: 107.77 B parameters, of which a token passes 17.2 B; 8 bytes each are kept."""
    empire = ("--hosts", ROOT / "hosts" / "empire.txt")
    found = say(ROOT / "recipes" / "scout.yaml", "--synthetic", "--json", *empire).json
    row = found["intentions"][-1]
    assert (row["verdict"], row["zero_stage"], len(row["nodes"])) == ("fits", 3, 4)
    assert sum(node["peak_bytes"] for node in row["nodes"]) > 8 * 107.77e9
    assert row["operations_per_token"] == pytest.approx(8 * 17.2e9, rel=0.1)
    rates = [4 * tflops * TERA for tflops in reversed(chip_named("M3-Ultra").tflops)]
    for days, tokens, rate in zip(row["days"], (1e10, 2e10), rates, strict=True):
        least = tokens * row["operations_per_token"] / rate / 86400
        assert least < days < 2 * least, "experts' weights are read for each row, and layers gathered"
    assert row["steps"] == [76_294, 152_588]


def test_an_unknown_chip_has_memory_and_no_times(rows, say, recipe, hosts) -> None:
    machine = "box slots=1 # memory=256GiB chip=M99"
    whole, found = rows(machine)
    assert "unknown chip M99" in whole["no_time"]
    assert {row["verdict"] for row in found.values()} == {"fits"}
    assert all(row["days"] is row["document"]["time_verdict"] is None for row in found.values())
    assert all("tokens x" not in row["why"] for row in found.values())
    said = say(recipe, "--synthetic", "--hosts", hosts(machine), *MODEL, *ROWS).out
    assert "unknown chip M99" in said
    assert " days" not in said.replace("3 to 5 days", "")


def test_what_does_not_fit_says_the_least_that_makes_it_fit(rows, say, recipe, hosts) -> None:
    """Which the report confirms, with the settings as they are told."""
    machine = "air slots=1 # memory=16GiB chip=M4"
    _, found = rows(machine)
    row = found[ONTOLOGY]
    assert (row["verdict"], row["days"]) == ("no", None)
    words = (recipe, "--hosts", hosts(machine), *MODEL, *ROWS, "tuning.type=full")
    assert say(*words).code == 3
    assert say(*words, *row["least"]["change"].split()).code == 0
    said = say(recipe, "--synthetic", "--hosts", hosts(machine), *MODEL, *ROWS).out.replace("\n", " ")
    assert f"{ONTOLOGY} fits with {row['least']['change']}"[:100] in said


def test_adapters_that_do_not_fit_are_told_of_a_packed_base(rows, say, recipe, hosts) -> None:
    machine = "mac slots=1 # memory=16GiB chip=M4"
    large = ("model.path=llama-3.1-8b", "data.sequence_length=512", "batch.global_size=1")
    _, found = rows(machine, *large)
    row = found["command tuning"]
    assert row["verdict"] == "no"
    assert row["least"]["change"] == "tuning.type=qlora tuning.bits=4"
    words = (recipe, "--hosts", hosts(machine), *MODEL, *ROWS, *large, "tuning.rank=16")
    assert say(*words, "tuning.type=lora").code == 3
    assert say(*words, *row["least"]["change"].split()).code == 0


def test_what_cannot_be_planned_is_a_sentence_and_the_others_stand() -> None:
    """Such as all weights of a folder that is stored packed."""

    def spec_of(recipe: Any) -> Any:
        if recipe.tuning.type == "full":
            raise UserError("tuning.type: full: packed")
        return llama_like()

    lora = recipe_of("tuning.type=lora")
    survey = synthetic(lora, spec_of, [node_of("one", 2**33, chip="M4")], WIRES[0])
    assert survey.impossible == [(ONTOLOGY, "tuning.type: full: packed")]
    assert len(survey.budgets) == 2
    with pytest.raises(UserError, match="packed"):
        synthetic(recipe_of(), spec_of, [node_of("one", 2**33)], WIRES[0])


@pytest.mark.parametrize("other", ["--matrix", "--ladder", "--trace=x.json", "--compare=x.csv"])
def test_words_that_do_not_go_together_are_refused_in_a_line(say, recipe, other: str) -> None:
    said = say(recipe, "--synthetic", other)
    assert (said.code, said.out, said.err.count("\n")) == (64, "", 1)


@settings(max_examples=10, deadline=None)
@given(st.integers(10**7, 10**10), st.integers(1, 9))
def test_hours_grow_as_tokens_do(tokens: int, times: int) -> None:
    """But for a step that is begun, and the weights that are read once."""
    plan = assess(recipe_of(), llama_like(), [node_of("one", 2**33)])
    chips, meant = [chip_named("M4")], replace(INTENTIONS[ONTOLOGY], tokens=(tokens, tokens * times))
    more = budget(ONTOLOGY, meant, plan, WIRES[0], chips, lambda _: llama_like())
    one = replace(meant, tokens=(tokens, tokens))
    few = budget(ONTOLOGY, one, plan, WIRES[0], chips, lambda _: llama_like())
    assert more.hours is not None
    assert few.hours is not None
    assert more.hours[0] == few.hours[0]
    assert more.hours[1] == pytest.approx(times * few.hours[1], rel=0.02)


@given(st.integers(1, 10**12), st.integers(1, 10**7))
def test_steps_hold_every_token_and_no_step_is_idle(tokens: int, positions: int) -> None:
    steps = steps_of_tokens(tokens, positions)
    assert (steps - 1) * positions < tokens <= steps * positions


@given(st.floats(1e6, 1e12), st.floats(1e6, 1e13), LENGTHS, st.floats(1, 10))
def test_the_rate_that_hours_ask_for_brings_those_hours(
    tokens: float, operations: float, hours: float, times: float
) -> None:
    pair = (tokens, tokens)
    rate = tflops_asked(pair, operations, (hours, hours * times))
    assert compute_hours(pair, operations, rate) == pytest.approx((hours, hours * times))


@given(LENGTHS, LENGTHS)
def test_two_numbers_agree_from_either_side_and_the_ratio_is_ours_over_theirs(a: float, b: float) -> None:
    there, back = agreement((a, a), (b, b)), agreement((b, b), (a, a))
    assert there.partition(":")[0] == back.partition(":")[0]
    assert (there == "agrees") == (max(a, b) / min(a, b) <= 1.15)
    if there != "agrees":
        assert float(there.split()[1]) == pytest.approx(b / a, rel=0.01)
