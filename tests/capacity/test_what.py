"""`capacity --what` as a user types it: ways, hours, dollars, deadline and budget; the largest model of a shape."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.planning import nodes_of, recipe_of

from mlx_empire.capacity.what import hours_of
from mlx_empire.errors import UserError
from mlx_empire.model import catalog
from mlx_empire.model.target import shaped_target
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.assess import assess
from mlx_empire.plan.largest import DENSE, largest, scaled

MAC = "mac slots=1 # memory=32GiB chip=M4"


def by_hand(heads: int, layers: int) -> int:
    """Parameters of Llama 3.3 70B's shape with so many heads of 128 and 8 groups of keys."""
    hidden, inner = 128 * heads, 448 * heads
    layer = 2 * hidden * hidden + 2 * 8 * 128 * hidden + 3 * hidden * inner + 2 * hidden
    return layers * layer + 2 * 128256 * hidden + hidden


@given(st.integers(1, 12), st.integers(1, 30))
def test_a_shape_is_scaled_in_width_and_depth(groups: int, layers: int) -> None:
    config, _ = catalog.load(DENSE)
    grown = scaled(config, 8 * groups, layers)
    assert {key for key in grown if grown[key] != config[key]} <= {
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
    }
    assert grown["hidden_size"] == 128 * 8 * groups
    assert (
        grown["intermediate_size"] * config["hidden_size"]
        == config["intermediate_size"] * grown["hidden_size"]
    )
    assert scaled({"text_config": config}, 8, 2)["text_config"] == scaled(config, 8, 2)
    assert scaled(config, config["num_attention_heads"], config["num_hidden_layers"]) == config


def test_the_largest_model_of_a_shape_fits_and_one_layer_more_does_not() -> None:
    recipe = recipe_of("memory.zero_stage=3", "memory.gradient_dtype=bfloat16", "data.sequence_length=256")
    config, _ = catalog.load(DENSE)
    nodes = nodes_of([40 * 2**30, 20 * 2**30])

    def spec_of(one: Any) -> Any:
        return shaped_target(one, DENSE, recipe).spec

    found = largest(recipe, config, spec_of, nodes, state_bytes_of)
    assert found is not None
    assert found.parameters == by_hand(found.heads, found.layers)
    assert found.assessment.verdict != "no"
    more = spec_of(scaled(config, found.heads, found.layers + 1))
    assert assess(recipe, more, nodes, state_bytes_of).verdict == "no"
    assert largest(recipe, config, spec_of, nodes_of([2**20]), state_bytes_of) is None


@pytest.mark.slow
def test_each_model_is_trained_the_most_thorough_way_that_fits(say, hosts) -> None:
    found = say("--what", "--hosts", hosts(MAC), "--tokens", "1000000", "--json").json
    assert {row["model"] for row in found["models"]} == set(catalog.names())
    ways = {row["model"]: row["way"] for row in found["models"]}
    assert ways["llama-3.2-1b"] == "all weights"
    assert ways["llama-3.1-8b"] == "adapters"
    assert ways["mistral-nemo-12b"] == "adapters, 4-bit base"
    assert ways["llama-3.3-70b"] is None
    assert found["largest"]["mixture"]["parameters"] > 10**9
    dense = found["largest"]["dense"]
    assert dense["parameters"] == by_hand(dense["heads"], dense["layers"])
    assert all(row["within"] is None for row in found["models"]), "nothing was asked"
    one = next(row for row in found["models"] if row["model"] == "llama-3.2-1b")
    assert 0 < one["run_hours"][0] < one["run_hours"][1]
    assert one["dollars"] is None, "no price is known of an M4 with 32 GB"


def test_deadline_and_budget_hold_at_worst(say, hosts) -> None:
    def row(*words: str) -> dict[str, Any]:
        mac = hosts("mac slots=1 # memory=256GiB chip=M3-Ultra")
        found = say("--what", "llama-3.2-1b", "--hosts", mac, "--tokens", "1000000", *words, "--json")
        assert found.code == 0
        (one,) = found.json["models"]
        return dict(one)

    plain = row()
    hours, dollars = plain["run_hours"][1], plain["dollars"][1]
    assert hours * 8099 / (3 * 8766) < dollars, "wear, and power on top"
    assert row("--deadline", f"{hours * 1.01:.3f}h", "--budget", f"{dollars * 1.01}")["within"] is True
    assert row("--deadline", f"{hours * 0.99:.3f}h", "--budget", f"{dollars * 1.01}")["within"] is False
    assert row("--budget", f"{dollars * 0.99}")["within"] is False


def test_a_person_reads_it_and_an_unknown_chip_has_no_hours(say, hosts) -> None:
    said = say(
        "--what", "llama-3.2-1b", "--hosts", hosts("mac slots=1 # memory=64GiB chip=M99"), "--deadline", "1d"
    )
    assert said.code == 0
    assert "all weights" in said.out
    assert "no time: unknown chip M99 of mac" in said.out
    assert "within" not in said.out
    assert "largest" not in said.out, "which is said where no model is named"


def test_what_else_than_memory_stands_against_a_model_is_said(say, hosts) -> None:
    mac = hosts(MAC)
    words = ("--what", "phi-3-mini-3.8b", "--hosts", mac, "--tokens", "1000000")
    (one,) = say(*words, "--json").json["models"]
    assert one["way"] is None
    assert "sliding window of 2047 tokens" in one["why"]
    assert f"phi-3-mini-3.8b: {one['why']}"[:70] in say(*words).out.replace("\n", " ")


def test_techniques_are_combined_freely(say, hosts) -> None:
    """What is asked for holds in each way; a setting of `tuning` takes the place of the ways."""
    mac = hosts("mac slots=1 # memory=48GiB chip=M4")

    def row(*words: str) -> dict[str, Any]:
        (one,) = say("--what", "llama-3.2-3b", "--hosts", mac, "--tokens", "1000000", *words, "--json").json[
            "models"
        ]
        return dict(one)

    eight = ("optimizer.state_bits=8", "optimizer.master_weights=diet", "memory.gradient_checkpointing=true")
    assert row("optimizer.state_bits=32", "optimizer.master_weights=fp32")["way"] == "adapters"
    assert row(*eight)["way"] == "all weights"
    asked = row("tuning.type=lora", "tuning.rank=64", "data.sequence_length=4096", "batch.global_size=4")
    assert (asked["way"], asked["settings"], asked["verdict"]) == ("as asked", {}, "fits")
    few, many = (row("tuning.type=lora", f"tuning.layers={n}")["run_hours"] for n in (4, 28))
    assert few[1] < many[1], "below the last four layers there is no backward"
    said = say("--what", "llama-3.2-3b", "--hosts", mac, "optimizer.stat=8")
    assert (said.code, said.out, said.err.count("\n")) == (64, "", 1)


@given(st.integers(1, 999))
def test_a_deadline_is_hours_days_or_weeks(count: int) -> None:
    assert hours_of(f"{count}h") * 24 == hours_of(f"{count}d")
    assert hours_of(f"{count}d") * 7 == hours_of(f"{count}w")


@pytest.mark.parametrize("written", ["", "7", "d", "0h", "-1d", "7 d", "7days", "1e3h"])
def test_a_deadline_that_is_none_is_refused(written: str) -> None:
    with pytest.raises(UserError, match="--deadline"):
        hours_of(written)


@pytest.mark.parametrize(
    "words",
    [
        ["--what", "unicorn"],
        ["--what", "llama-3.2-1b", "--tokens", "0"],
        ["--what", "llama-3.2-1b", "--budget", "-1"],
        ["--what", "llama-3.2-1b", "--deadline", "soon"],
        ["--federation", "x.yaml", "--deadline", "7d"],
        ["--federation", "x.yaml", "--tokens", "1000"],
        ["--federation", "x.yaml", "optimizer.state_bits=8"],
        ["scout", "--federation", "x.yaml"],
        ["scout", "--fed", "x.yaml"],
        ["--federation", "x.yaml", "--what"],
    ],
)
def test_words_that_do_not_go_together_are_refused_in_a_line(say, hosts, words: list[str]) -> None:
    said = say(*words, "--hosts", hosts(MAC))
    assert (said.code, said.out, said.err.count("\n")) == (64, "", 1)


def test_the_help_names_both_questions_that_need_no_recipe(say) -> None:
    told = say("--help").out
    assert "--what [NAME] --hosts" in told
    assert "--federation FILE" in told
    assert "--tokens" in say("--what", "--help").out
