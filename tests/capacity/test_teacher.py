"""What a report says of a teacher's pass: planned as a model alone that only runs forward, and its verdict counts."""

from __future__ import annotations

import pytest
from support.planning import recipe_of

from mlx_empire.data.taught import TaughtEntry
from mlx_empire.daughters.machine import refuse_unbuilt
from mlx_empire.errors import DoesNotFitError, UserError
from mlx_empire.run import teacher
from mlx_empire.run.teacher import asked_recipe

TEACHER = ("distillation.teacher=llama-3.2-3b", "distillation.top=32")


def test_the_pass_of_a_larger_model_is_planned_beside_the_run(say, recipe, hosts):
    file = hosts("king slots=1 # role=king memory=64GiB chip=M3-Ultra")
    asked = say(recipe, "--hosts", file, "--json", *TEACHER).json
    about, alone = asked["teacher"], say(recipe, "--hosts", file, "--json").json
    assert alone["teacher"] is None
    assert about["verdict"] == asked["verdict"] == "fits"
    # Bfloat16 weights of 3.21 billion parameters, rows, logits; no gradient and no state.
    assert 2 * 3.21e9 <= about["peak_bytes"][0] <= 2.6 * 3.21e9
    assert about["bytes_per_target"] == 4 * 32 + 2 * 33
    (note,) = [one for one in asked["notes"] if one.startswith("distillation.teacher")]
    assert note == about["sentence"]
    small = hosts("king slots=1 # role=king memory=64GiB limit=4GiB chip=M3-Ultra")
    ended = say(recipe, "--hosts", small, "--json", *TEACHER)
    refused = ended.json
    assert ended.code == 3
    assert refused["verdict"] == refused["teacher"]["verdict"] == "no"
    assert "llama-3.2-3b: one pass over all rows before the first step: no" in refused["reason"]


def test_its_recipe_trains_nothing_and_has_a_dtype_of_its_own():
    asked = recipe_of(*TEACHER, "tuning.type=lora", "batch.micro_size=4", "optimizer.in_backward=true")
    made = asked_recipe(asked, 3)
    assert (made.model.path.name, made.model.dtype) == ("llama-3.2-3b", None)
    assert (made.tuning.type, made.batch.micro_size, made.batch.global_size) == ("full", 1, 24)
    assert not made.optimizer.in_backward


def test_values_that_the_disk_has_no_room_for_are_refused_before_the_pass(monkeypatch, tmp_path):
    entry = TaughtEntry(tmp_path / "teachers" / "one", 10**9, 64)
    monkeypatch.setattr(teacher, "free_bytes", lambda place: 10**9)
    with pytest.raises(DoesNotFitError, match="1,000,000,000 targets take 367 GiB and 954 MiB are free"):
        teacher._require_room(entry, writes=True)
    teacher._require_room(entry, writes=False)  # another machine's business


def test_many_daughters_have_no_teacher():
    with pytest.raises(UserError, match="only `train` asks a teacher"):
        refuse_unbuilt(recipe_of(*TEACHER, "tuning.type=lora"))
