"""A daughter's generations: whatever is cut short is made good, the better one is in use, and a person can go back."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_empire import progress
from mlx_empire.daughters import source
from mlx_empire.daughters.generations import Generations
from mlx_empire.daughters.source import JobSource, decide_newest
from mlx_empire.daughters.watch import manage, refuse_unwatchable
from mlx_empire.errors import UserError
from mlx_empire.recipe.load import dump_recipe, parse_recipe
from mlx_empire.recipe.schema import Recipe

RECIPE = """\
model: {path: base}
tuning: {type: lora}
data: {path: people, format: tokens, sequence_length: 8}
batch: {global_size: 1}
optimizer: {learning_rate: 0.001}
run: {dir: runs, steps: 3}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    offer(1, 2, 3)
    return parse_recipe(RECIPE, "r")


@pytest.fixture
def alice(recipe: Recipe) -> Generations:
    """The first generation of one person is finished."""
    jobs = JobSource(recipe, Path("people"), watched=True)
    complete(Path("runs/alice"), recipe, [3.0, 2.0])
    jobs.begun("alice", goes_on=False)
    return jobs.generations("alice")


@pytest.fixture(autouse=True)
def unhooked() -> Iterator[None]:
    yield
    progress.on_reach(None)


def offer(*numbers: int) -> None:
    Path("people/alice").mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", numbers), ("valid", (90, 91))):
        lines = [json.dumps({"tokens": [n, n]}) + "\n" for n in rows]
        Path(f"people/alice/{split}.jsonl").write_text("".join(lines))


def complete(folder: Path, recipe: Recipe, losses: list[float]) -> None:
    """What a training of two evaluations leaves."""
    (folder / "final").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    records = [{"step": 3 * i, "eval_loss": loss} for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "COMPLETE").write_text("\n")


def strike_at(phase: str) -> None:
    """From here on the phase is where this process would die."""

    def strike(reached: str, _: int) -> None:
        if reached == phase:
            raise KeyboardInterrupt(phase)

    progress.on_reach(strike)


@pytest.mark.parametrize("phase", ["prepare", "decide", "promote"])
def test_a_kill_at_any_moment_is_made_good_by_the_next_round(
    phase: str, recipe: Recipe, alice: Generations
) -> None:
    jobs = JobSource(recipe, Path("people"), watched=True)
    offer(1, 2, 3, 4)
    if phase == "prepare":
        strike_at(phase)
        with pytest.raises(KeyboardInterrupt):
            jobs.prepare("alice")
        assert alice.numbers == [1]
        progress.on_reach(None)
    assert jobs.prepare("alice")
    assert (alice.unfinished, alice.current) == (2, 1)
    job = jobs.of("alice")
    assert (str(job.run.dir), str(job.tuning.start)) == ("runs/alice/generations/2", "runs/alice/final")
    rows = [
        json.loads(line)["tokens"][0] for line in (job.data.path / "train.jsonl").read_text().splitlines()
    ]
    assert 4 in rows
    complete(job.run.dir, job, [2.0, 1.5])
    if phase != "prepare":
        strike_at(phase)
        with pytest.raises(KeyboardInterrupt):
            decide_newest(alice)
        assert alice.decision(2) is None
        assert alice.current == (2 if phase == "promote" else 1)
        progress.on_reach(None)
    assert not jobs.prepare("alice")
    assert (alice.current, alice.unfinished) == (2, None)
    assert os.readlink("runs/alice/current") == "generations/2/final"
    found = alice.decision(2)
    assert found is not None
    assert (found.promoted, found.begun_from, found.why) == (True, 1, "eval_loss 2.0000 -> 1.5000")
    assert sorted(p.name for p in Path("runs/alice").iterdir() if p.name.startswith(".")) == []


def next_generation(recipe: Recipe, *losses: float) -> str:
    jobs = JobSource(recipe, Path("people"), watched=True)
    assert jobs.prepare("alice")
    job = jobs.of("alice")
    complete(job.run.dir, job, list(losses))
    return jobs.done("alice")


def test_who_goes_back_while_it_is_decided_is_heard(recipe: Recipe, alice: Generations) -> None:
    """The person's word comes second: it waits for the decision, which would be put over it otherwise."""
    jobs, persons = JobSource(recipe, Path("people"), watched=True), []

    def go_back(reached: str, _: int) -> None:
        if reached == "decide":
            persons.append(threading.Thread(target=manage, args=(jobs, ["alice=1"], [], [])))
            persons[0].start()
            persons[0].join(0.3)

    offer(1, 2, 3, 4)
    progress.on_reach(go_back)
    assert "generation 2 is in use" in next_generation(recipe, 2.0, 1.0)
    persons[0].join()
    assert alice.current == 1


def test_what_a_kill_left_undecided_does_not_come_back_over_a_person(
    recipe: Recipe, alice: Generations
) -> None:
    offer(1, 2, 3, 4)
    strike_at("promote")
    with pytest.raises(KeyboardInterrupt):
        next_generation(recipe, 2.0, 1.0)
    progress.on_reach(None)
    assert (alice.current, alice.decision(2)) == (2, None)
    jobs = JobSource(recipe, Path("people"), watched=True)
    manage(jobs, ["alice"], [], [])
    assert not jobs.prepare("alice")
    assert alice.current == 1
    found = alice.decision(2)
    assert found is not None
    assert (found.promoted, found.why) == (False, "generation 1 was put into use")


def test_a_worse_one_is_kept_and_not_used_and_its_rows_come_again_with_newer_ones(
    recipe: Recipe, alice: Generations
) -> None:
    offer(1, 2, 3, 4)
    said = next_generation(recipe, 2.0, 2.5)
    assert said == "generation 2 is kept, generation 1 stays in use: eval_loss 2.0000 -> 2.5000"
    jobs = JobSource(recipe, Path("people"), watched=True)
    assert not jobs.prepare("alice"), "the same rows again would be refused again"
    assert alice.current == 1
    offer(1, 2, 3, 4, 5)
    assert "generation 3 is in use" in next_generation(recipe, 2.0, 1.0)
    learnt = alice.learnt(3)
    four_and_five = rows_hashes(4, 5)
    assert learnt is not None
    assert four_and_five <= set(learnt.train)
    assert alice.lineage(3) == [3, 1]
    offer(1, 2, 3, 4, 5, 6)
    next_generation(recipe, 1.0, 0.5)
    assert alice.lineage(4) == [4, 3, 1]


def rows_hashes(*numbers: int) -> set[str]:
    from mlx_empire.daughters.rows import row_hash

    return {row_hash({"tokens": [n, n]}) for n in numbers}


def test_an_unfinished_one_goes_on_with_its_rows_and_begins_anew_with_others(
    recipe: Recipe, alice: Generations
) -> None:
    jobs = JobSource(recipe, Path("people"), watched=True)
    offer(1, 2, 3, 4)
    assert jobs.prepare("alice")
    begun = Path("runs/alice/generations/2/metrics.jsonl")
    begun.write_text("")
    assert jobs.prepare("alice")
    assert begun.exists()
    offer(1, 2, 3, 4, 5)
    assert jobs.prepare("alice")
    assert not begun.exists()
    learnt = alice.learnt(2)
    assert learnt is not None
    assert rows_hashes(4, 5) <= set(learnt.train)


def test_a_person_goes_back_pins_and_goes_on(
    recipe: Recipe, alice: Generations, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = JobSource(recipe, Path("people"), watched=True)
    offer(1, 2, 3, 4)
    next_generation(recipe, 2.0, 1.5)
    manage(jobs, ["alice"], ["alice"], [])
    assert capsys.readouterr().out.splitlines() == [
        "alice: generation 1 (in use, pinned): finished",
        "alice: generation 2: promoted: eval_loss 2.0000 -> 1.5000",
    ]
    offer(1, 2, 3, 4, 5)
    assert not jobs.prepare("alice")
    manage(jobs, [], [], ["alice"])
    assert "generation 3 is in use" in next_generation(recipe, 2.0, 1.0)
    learnt = alice.learnt(3)
    assert learnt is not None
    assert rows_hashes(4, 5) <= set(learnt.train), "what the one that was left had learnt is new again"
    manage(jobs, ["alice=2"], [], [])
    assert alice.current == 2
    for asked, said in (
        (["alice=7"], "--rollback: alice=7: no such generation is finished; there are 1, 2, 3"),
        (["alice=x"], "--rollback: alice=x: expected NAME or NAME=N, such as alice=1"),
        (["bob"], "--rollback: bob: no finished daughter is in runs/bob; name one, such as alice"),
        (
            ["../alice"],
            "--rollback: ../alice: no finished daughter is in runs/../alice; name one, such as alice",
        ),
    ):
        with pytest.raises(UserError) as caught:
            manage(jobs, asked, [], [])
        assert str(caught.value) == said
    manage(jobs, ["alice=1"], [], [])
    with pytest.raises(UserError, match="generation 1 is in use, and there is none before it"):
        manage(jobs, ["alice"], [], [])


def test_what_cannot_be_written_is_one_line(recipe: Recipe, alice: Generations) -> None:
    jobs = JobSource(recipe, Path("people"), watched=True)
    for name in (".current", "PINNED"):
        Path(f"runs/alice/{name}/somebodys").mkdir(parents=True)
    for words in ((["alice=1"], [], []), ([], ["alice"], []), ([], [], ["alice"])):
        with pytest.raises(UserError, match=r"^runs/alice: cannot be written: [^\n]*$"):
            manage(jobs, *words)


def test_another_recipe_without_new_rows_is_told_and_accepted_or_pinned_it_is_not(
    recipe: Recipe, alice: Generations
) -> None:
    for words, said in (
        ([], None),
        (["optimizer.learning_rate=0.5"], "optimizer.learning_rate: 0.001 -> 0.5"),
        (["optimizer.learning_rate=0.5", "run.accept_changes=[optimizer.learning_rate]"], None),
        (["daughters.replay=0.9", "run.save_every=1"], None),
    ):
        jobs = JobSource(parse_recipe(RECIPE, "r", words), Path("people"), watched=True)
        assert not jobs.prepare("alice")
        assert jobs.other_recipe("alice") == said
    alice.pin(on=True)
    jobs = JobSource(parse_recipe(RECIPE, "r", ["optimizer.learning_rate=0.5"]), Path("people"), watched=True)
    assert jobs.other_recipe("alice") is None


def test_the_newest_generation_says_by_which_recipe_it_was_trained(
    recipe: Recipe, alice: Generations
) -> None:
    offer(1, 2, 3, 4)
    other = parse_recipe(RECIPE, "r", ["optimizer.learning_rate=0.5"])
    next_generation(other, 2.0, 1.5)
    assert JobSource(other, Path("people"), watched=True).other_recipe("alice") is None
    found = JobSource(recipe, Path("people"), watched=True).other_recipe("alice")
    assert found == "optimizer.learning_rate: 0.5 -> 0.001"


def test_rows_are_read_again_where_one_begins_and_not_where_it_goes_on(
    recipe: Recipe, alice: Generations, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, before = JobSource(recipe, Path("people")), alice.learnt(1)
    offer(1, 2)
    with monkeypatch.context() as patched:
        patched.setattr(source, "rows_of", lambda _: pytest.fail("the files were read"))
        jobs.begun("alice", goes_on=True)
    assert alice.learnt(1) == before
    jobs.begun("alice", goes_on=False)  # anew, as run.resume: never does, and its rows are others by now
    learnt = alice.learnt(1)
    assert learnt is not None
    assert set(learnt.train) == rows_hashes(1, 2)
    Path("runs/alice/rows.json").unlink()
    jobs.begun("alice", goes_on=True)  # an earlier version noted nothing
    assert alice.learnt(1) == learnt


def test_one_that_was_left_meanwhile_is_not_replaced(recipe: Recipe, alice: Generations) -> None:
    offer(1, 2, 3, 4)
    next_generation(recipe, 2.0, 1.5)
    offer(1, 2, 3, 4, 5)
    jobs = JobSource(recipe, Path("people"), watched=True)
    assert jobs.prepare("alice")
    job = jobs.of("alice")
    complete(job.run.dir, job, [1.5, 1.0])
    alice.roll_back(None)
    assert jobs.done("alice") == (
        "generation 3 is kept, generation 1 stays in use: eval_loss 1.5000 -> 1.0000; but generation 1 was put into use"
    )


def test_nothing_held_out_is_refused_before_anything_is_trained(recipe: Recipe, alice: Generations) -> None:
    offer(1, 2, 3, 4)
    Path("people/alice/valid.jsonl").unlink()
    with pytest.raises(
        UserError, match="people/alice: nothing is held out to judge a new generation by; add"
    ):
        JobSource(recipe, Path("people"), watched=True).prepare("alice")
    assert alice.numbers == [1]


def test_never_is_refused_for_it_would_undo_what_went_on(recipe: Recipe) -> None:
    with pytest.raises(UserError, match=r"^run.resume: never: --watch goes on from what there is; use auto$"):
        refuse_unwatchable(parse_recipe(RECIPE, "r", ["run.resume=never"]))
