"""What a person reads when a recipe is wrong: one line with place, key, value and remedy, exit code 64."""

import os
import re
from pathlib import Path

import pytest

from mlx_empire.errors import UserError
from mlx_empire.recipe.changes import value
from mlx_empire.recipe.duration import Duration
from mlx_empire.recipe.explain import leaf_fields
from mlx_empire.recipe.load import load_recipe, parse_recipe

# What replaces which line of the minimal recipe -> place and words that the message must have.
# Lines: 1 model, 2 path, 3 data, 4 path, 5 sequence_length, 6 batch, 7 global_size, 8 optimizer,
# 9 learning_rate, 10 run, 11 dir, 12 steps.
MALFORMED: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "misspelled key": (
        9,
        "  learning_rat: 1e-3",
        ("x.yaml:9: ", "optimizer.learning_rat: unknown key", "optimizer.learning_rate?"),
    ),
    "misspelled section": (
        8,
        "optimiser:",
        ("x.yaml:8: ", "optimiser: unknown key", "did you mean optimizer?"),
    ),
    "key of another section": (
        12,
        "  steps: 10\n  warmup: 3%",
        ("x.yaml:13: ", "did you mean schedule.warmup?"),
    ),
    "key at top level": (1, "seed: 1\nmodel:", ("x.yaml:1: seed: unknown key", "did you mean run.seed?")),
    "unknown to all": (12, "  steps: 10\n  zzz: 1", ("x.yaml:13: run.zzz: unknown key", "steps, seed")),
    "missing key": (7, "  micro_size: 1", ("x.yaml:6: batch.global_size: missing", "whole number")),
    "missing section": (1, "tuning: {}\nreport:", ("unknown key",)),
    "section as value": (6, "batch: 8\nx:", ("x.yaml:7: x: unknown key",)),
    "number as text": (7, "  global_size: '8'", ("x.yaml:7: batch.global_size: got '8'; expected a whole",)),
    "fraction": (7, "  global_size: 8.0", ("x.yaml:7: batch.global_size: got 8.0; expected a whole",)),
    "boolean as number": (7, "  global_size: true", ("x.yaml:7: batch.global_size: got true;",)),
    "negative": (5, "  sequence_length: -16", ("x.yaml:5: data.sequence_length: got -16;", "from 1 to")),
    "zero rate": (
        9,
        "  learning_rate: 0",
        ("x.yaml:9: optimizer.learning_rate: got 0; expected a number above 0",),
    ),
    "infinite rate": (9, "  learning_rate: .inf", ("x.yaml:9:", "got .inf;")),
    "rate with a lost minus": (9, "  learning_rate: 1e5", ("x.yaml:9:", "got 100000.0;", "1e-5")),
    "huge integer": (12, "  steps: 1\n  seed: 99999999999999999999", ("x.yaml:13: run.seed: got 9999",)),
    "wrong choice": (
        4,
        "  path: d\n  format: chatt",
        ("x.yaml:5: data.format: got 'chatt'", "did you mean chat?"),
    ),
    "wrong case": (9, "  learning_rate: 1\n  name: AdamW", ("got 'AdamW'", "did you mean adamw?")),
    "wrong number": (
        9,
        "  learning_rate: 1\n  state_bits: 16",
        ("x.yaml:10:", "got 16; expected 8 or 32", "8?"),
    ),
    "true for a stage": (
        12,
        "  steps: 1\nmemory: {zero_stage: true}",
        ("memory.zero_stage: got true; expected",),
    ),
    "1.0 for a stage": (12, "  steps: 1\nmemory: {zero_stage: 1.0}", ("memory.zero_stage: got 1.0",)),
    "yes for true": (4, "  path: d\n  packing: yes", ("data.packing: got 'yes'; expected true or false",)),
    "one beta": (9, "  learning_rate: 1\n  betas: [0.9]", ("x.yaml:10: optimizer.betas: got", "two numbers")),
    "beta of one": (9, "  learning_rate: 1\n  betas: [0.9, 1]", ("optimizer.betas: got 1 at position 2;",)),
    "negative share": (
        12,
        "  steps: 1\nmemory: {shares: [2, -1]}",
        ("memory.shares: got [2, -1]; expected",),
    ),
    "empty path": (2, "  path: ''", ("x.yaml:2: model.path: got ''; expected the path",)),
    "null path": (2, "  path:", ("x.yaml:2: model.path: got null;",)),
    "control character in path": (11, '  dir: "a\\nb"', ("x.yaml:11: run.dir: got 'a\\nb';",)),
    "no home": (11, "  dir: ~no-such-user-here/x", ("x.yaml:11: run.dir: got '~no-such-user-here/x'",)),
    "percent of itself": (12, "  steps: 5%", ("x.yaml:12: run.steps: got '5%'; expected a duration",)),
    "no steps": (12, "  steps: 0", ("x.yaml:12: run.steps: got 0;",)),
    "unit": (12, "  steps: 5 Megatokens", ("x.yaml:12: run.steps: got '5 Megatokens';", "5Mtok")),
    "not a divisor": (
        7,
        "  global_size: 8\n  micro_size: 3",
        ("x.yaml:8: batch.micro_size:", "8", "3", "use", "2"),
    ),
    "too many cells": (
        7,
        "  global_size: 8\n  cells: 9",
        ("x.yaml:8: batch.cells: cells 9", "use 8 or less"),
    ),
    "long warmup": (
        12,
        "  steps: 10\nschedule: {warmup: 11}",
        ("x.yaml:13: schedule.warmup: warmup 11", "3%"),
    ),
    "final": (12, "  steps: 10\nschedule: {final: 0.1}", ("x.yaml:13: schedule.final:", "cosine or linear")),
    "rank": (
        1,
        "tuning: {rank: 8}\nmodel:",
        ("tuning.rank: rank has no meaning for type full", "use type lora"),
    ),
    "save never": (
        12,
        "  steps: 10\n  save_every: 0",
        ("run.save_every: got 0; expected a duration above 0",),
    ),
    "step zero": (12, "  steps: 10\n  resume: 0", ("x.yaml:13: run.resume: got 0; expected auto",)),
    "unknown change": (
        12,
        "  steps: 10\n  accept_changes: [run.step]",
        ("run.accept_changes: there is no key run.step;",),
    ),
    "no key": (
        12,
        "  steps: 10\n  accept_changes: [steps]",
        ("run.accept_changes: got", "a list of keys"),
    ),
    "repeated key": (
        12,
        "  steps: 10\n  steps: 11",
        ("x.yaml:13: run.steps: this key stands on line 12 already",),
    ),
    "no colon": (12, "  steps 10", ("x.yaml:1", "not valid YAML")),
    "alias": (12, "  steps: *ten", ("x.yaml:12: YAML alias *ten; write the value out",)),
}


def assert_one_line(error: pytest.ExceptionInfo[UserError], *words: str) -> None:
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    assert error.value.exit_code == 64
    for word in words:
        assert word in message


@pytest.mark.parametrize(("line", "replacement", "words"), MALFORMED.values(), ids=MALFORMED)
def test_malformed(tmp_path: Path, minimal: str, line: int, replacement: str, words: tuple[str, ...]) -> None:
    lines = minimal.splitlines()
    lines[line - 1] = replacement
    path = tmp_path / "x.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError) as error:
        load_recipe(path)
    assert_one_line(error, *words)
    assert str(error.value).startswith(str(path))


def test_a_missing_section_is_asked_for_with_its_keys(minimal: str) -> None:
    with pytest.raises(UserError) as error:
        parse_recipe(minimal.replace("batch:\n  global_size: 8\n", ""), "x.yaml")
    assert_one_line(error, "x.yaml: batch: this section is missing; add 'batch:' with global_size")


def test_a_section_needs_keys(minimal: str) -> None:
    with pytest.raises(UserError) as error:
        parse_recipe(minimal + "memory: [1]\n", "x.yaml")
    assert_one_line(error, "x.yaml:13: memory: got [1]; expected a section", "zero_stage")


@pytest.mark.parametrize("text", ["", "# only a comment\n", "5", "[model, data]", "model"])
def test_a_recipe_is_a_mapping(text: str) -> None:
    with pytest.raises(UserError) as error:
        parse_recipe(text, "x.yaml")
    assert_one_line(error, "x.yaml:1: ", "expected the sections model, tuning, data")


def test_the_minimal_recipe_has_the_documented_defaults(minimal: str) -> None:
    recipe = parse_recipe(minimal + "report:\n", "x.yaml")  # an empty section is one
    assert recipe.model.path == Path("models/tiny")
    assert recipe.optimizer.learning_rate == 1e-3
    assert recipe.run.steps == Duration(10, "steps")
    assert (recipe.model.init, recipe.model.dtype, recipe.tuning.type) == ("pretrained", None, "full")
    assert (recipe.data.format, recipe.data.packing, recipe.data.mask_prompt) == ("auto", False, True)
    assert (recipe.batch.micro_size, recipe.batch.cells) == (1, "auto")
    optimizer = recipe.optimizer
    assert (optimizer.state_bits, optimizer.master_weights, optimizer.clip_norm) == (32, "exact", 1.0)
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay) == ((0.9, 0.999), 1e-8, 0.0)
    assert (recipe.schedule.type, recipe.schedule.warmup, recipe.schedule.final) == (
        "constant",
        Duration(0),
        0,
    )
    memory = recipe.memory
    assert (memory.gradient_checkpointing, memory.zero_stage, memory.gradient_dtype) == ("auto",) * 3
    assert memory.shares == "memory"
    assert (recipe.run.seed, recipe.run.resume, recipe.run.hosts) == (0, "auto", None)


def test_overrides_win_over_the_file_and_later_ones_over_earlier(minimal: str) -> None:
    overrides = ["memory.zero_stage=2", "memory.shares=[2,1]", "run.steps=5Mtok", "run.steps=7"]
    overrides += [
        "optimizer.clip_norm=null",
        "optimizer.learning_rate=1e-5",
        "run.dir='a b'",
        "schedule.warmup=3%",
    ]
    recipe = parse_recipe(minimal, "x.yaml", overrides)
    assert recipe.memory.zero_stage == 2
    assert recipe.memory.shares == (2.0, 1.0)
    assert recipe.run.steps == Duration(7, "steps")
    assert recipe.optimizer.clip_norm is None
    assert recipe.optimizer.learning_rate == 1e-5
    assert recipe.run.dir == Path("a b")
    assert recipe.schedule.warmup == Duration(3, "percent")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["memory.zero_stagee=2"], ["override 'memory.zero_stagee=2': ", "did you mean memory.zero_stage?"]),
        (["memmory.zero_stage=2"], ["override 'memmory.zero_stage=2': ", "did you mean memory?"]),
        (["memory.zero_stage=9"], ["override 'memory.zero_stage=9': memory.zero_stage: got 9", "3?"]),
        (["run.steps"], ["override 'run.steps': expected section.key=value"]),
        (["steps=5"], ["override 'steps=5': expected section.key=value"]),
        (["run={steps: 5}"], ["expected section.key=value"]),
        (["run.steps=[5"], ["override 'run.steps=[5': run.steps: not valid YAML"]),
        (["run.steps=\n\n"], ["override 'run.steps=\\n\\n': run.steps: got null"]),
        (["run.dir=\udc80"], ["override 'run.dir=\\udc80': run.dir"]),
        (["run.dir=" + "a" * 100_000], ["the value is longer than"]),
        (["batch.global_size=9", "batch.micro_size=2"], ["override 'batch.micro_size=2': batch.micro_size"]),
        (["batch.global_size=9"], ["override 'batch.global_size=9': batch.global_size: global_size 9"]),
        (["run.steps=1"], ["override 'run.steps=1': run.steps: warmup 2 is longer"]),
    ],
)
def test_wrong_overrides_are_named(minimal: str, overrides: list[str], words: list[str]) -> None:
    text = minimal.replace("global_size: 8", "global_size: 8\n  micro_size: 2") + "schedule:\n  warmup: 2\n"
    with pytest.raises(UserError) as error:
        parse_recipe(text, "x.yaml", overrides)
    assert_one_line(error, *words)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin1.yaml").write_bytes(b"model:\n  path: caf\xe9\n")
    (tmp_path / "big.yaml").write_bytes(b"#" * (2 << 20))
    os.mkfifo(tmp_path / "fifo")
    cases = {
        tmp_path / "missing.yaml": "No such file",
        tmp_path: "a directory",
        tmp_path / "fifo": "not a regular file",
        tmp_path / "latin1.yaml": "latin1.yaml:2: byte 0xe9 is not UTF-8",
        tmp_path / "big.yaml": "larger than",
        tmp_path / "big.yaml" / "x": "Not a directory",
        tmp_path / ("x" * 300): "too long",
        Path("nul\0"): "not a possible path",
        Path("/dev/zero"): "not a regular file",
    }
    for path, words in cases.items():
        with pytest.raises(UserError) as error:
            load_recipe(path)
        assert_one_line(error, words)


@pytest.mark.parametrize("key", sorted(leaf_fields()))
def test_numbers_are_no_booleans_and_booleans_no_numbers(key: str) -> None:
    """Each value that is accepted is of the kind it was written in; 1 equals true in Python, and is refused for it."""
    text = (Path(__file__).parents[2] / "recipes/daughter.yaml").read_text()
    for written in ("true", "false", "1", "0", "1.0", "0.0"):
        try:
            recipe = parse_recipe(text, "x", [f"{key}={written}"])
        except UserError:
            continue
        found = value(recipe, key)
        assert isinstance(found, bool) == (written in ("true", "false")), (key, written)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["run.steps=8h"], "run.steps: got '8h'; expected a duration above 0: steps (100), counted targets"),
        (
            ["schedule.warmup=30min"],
            "schedule.warmup: got '30min'; expected a duration: steps (100), percent",
        ),
        (
            ["run.eval_every=30min", "evaluation.stop_when={metric: eval_loss, at_most: 2}"],
            "the run's end would hang on when eval_every 30min happens to evaluate; use steps",
        ),
        (
            ["run.save_every=2h", "numerics.spikes=rollback"],
            "the result would hang on when save_every 2h happens to save; use steps",
        ),
    ],
)
def test_wall_time_is_refused_where_the_result_would_hang_on_it(
    minimal: str, overrides: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        parse_recipe(minimal, "x", overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["optimizer.master_weights=diet"],
            "diet completes bfloat16 weights; with float16 use exact or fp32",
        ),
        (["memory.gradient_dtype=bfloat16"], "bfloat16 would keep less of a float16 gradient than there is"),
        (["optimizer.in_backward=true"], "in_backward updates before an overflow is known"),
        (["model.dtype=bfloat16", "numerics.loss_scale=8"], "8.0 serves float16 alone"),
        (["numerics.loss_scale=1000"], "numerics.loss_scale: got 1000; expected auto (with float16 dynamic"),
        (["numerics.loss_scale=0.5"], "numerics.loss_scale: got 0.5; expected"),
    ],
)
def test_what_float16_excludes_is_refused(minimal: str, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        parse_recipe(minimal, "x", ["model.dtype=float16", *overrides])


def test_a_loss_scale_may_be_a_power_of_two(minimal: str) -> None:
    released = ["model.dtype=float16", "numerics.loss_scale=1024", "optimizer.in_backward=true"]
    assert parse_recipe(minimal, "x", released).numerics.loss_scale == 1024.0
