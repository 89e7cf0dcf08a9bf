"""When a gate is reached, and what is said of it."""

import pytest

from mlx_empire.evaluation.gate import GateKeeper
from mlx_empire.recipe.evaluation import Gate


def gate(**fields):
    return Gate.model_validate({"metric": "facts.exact_match", **fields})


def record(step, value):
    return {"step": step, "eval_loss": 2.0, "scores": {"facts.exact_match": value}}


def watched(keeper, *values):
    return [keeper.observe(record(10 * i, value)) for i, value in enumerate(values)]


def test_so_many_times_in_a_row():
    keeper = GateKeeper(gate(at_least=0.9, **{"for": 2}))
    assert watched(keeper, 0.95, 0.5, 0.9, 0.8, 0.92, 0.9) == [False] * 5 + [True]
    assert keeper.sentence() == (
        "the gate is reached at step 50: facts.exact_match is 0.9 (facts.exact_match at least 0.9, 2 times in a row)"
    )


def test_at_most_and_the_held_out_loss():
    keeper = GateKeeper(Gate(metric="eval_loss", at_most=1.5))
    assert not keeper.observe({"step": 1, "eval_loss": 1.6})
    assert keeper.observe({"step": 2, "eval_loss": 1.5})


def test_what_was_evaluated_before_a_restart_counts():
    keeper = GateKeeper(gate(at_least=0.9, **{"for": 2}), [record(0, 0.1), record(10, 1.0)])
    assert keeper.observe(record(20, 0.9))


def test_what_was_evaluated_only_to_compare_does_not_count():
    """Between two evaluations of a run's own, and on resume."""
    compared = {**record(5, 1.0), "comparison": True}
    keeper = GateKeeper(gate(at_least=0.9, **{"for": 2}), [record(0, 0.1), compared, record(10, 1.0)])
    assert not keeper.reached
    assert not keeper.observe({**record(12, 1.0), "comparison": True})
    assert keeper.observe(record(20, 0.9))
    assert keeper.sentence().startswith("the gate is reached at step 20")


def test_a_gate_that_is_not_reached_says_how_near_it_came():
    keeper = GateKeeper(gate(at_least=0.9))
    assert not any(watched(keeper, 0.1, 0.8, 0.7))
    assert keeper.sentence() == (
        "the gate was not reached: facts.exact_match at least 0.9 was asked; it was 0.8 at its best (step 10) and "
        "0.7 at the end, so the result is not frozen"
    )
    assert "never measured" in GateKeeper(gate(at_least=0.9)).sentence()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_without_a_gate_nothing_ends(value):
    keeper = GateKeeper(None)
    assert not keeper.observe(record(1, value))
    assert not keeper.asks
    assert not keeper.reached


def test_a_gate_of_several_scores_is_reached_where_all_hold_at_once():
    second = {"metric": "eval_loss", "at_most": 1.5, "for": 2}
    keeper = GateKeeper(gate(at_least=0.9, **{"and": [second]}))
    found = [
        keeper.observe({"step": step, "eval_loss": loss, "scores": {"facts.exact_match": match}})
        for step, (match, loss) in enumerate([(1.0, 1.6), (1.0, 1.4), (0.8, 1.4), (0.95, 1.5)])
    ]
    assert found == [False, False, False, True]
    assert keeper.sentence() == (
        "the gate is reached at step 3: facts.exact_match is 0.95 (facts.exact_match at least 0.9); eval_loss is 1.5 "
        "(eval_loss at most 1.5, 2 times in a row)"
    )
    keeper.observe({"step": 4, "eval_loss": 2.0, "scores": {"facts.exact_match": 1.0}})
    said = keeper.sentence()
    assert said.startswith(
        "the gate was not reached: eval_loss at most 1.5, 2 times in a row was asked; it was 1.4"
    )
    assert "facts.exact_match" not in said


def test_gates_of_one_list_stand_side_by_side():
    inner = {"metric": "eval_loss", "at_most": 1.5}
    with pytest.raises(ValueError, match="gates of one list stand side by side"):
        gate(at_least=0.9, **{"and": [{**inner, "and": [inner]}]})
