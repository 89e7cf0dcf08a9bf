"""The commands with which a run ends are ones that can be typed: by the parsers of mlx-lm and of the verbs."""

from __future__ import annotations

import json
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from mlx_lm.generate import setup_arg_parser
from support.our_families import config_of

from mlx_empire.chat.command import read as read_chat
from mlx_empire.cli import VERBS
from mlx_empire.export.command import parser as export_parser
from mlx_empire.recipe.load import parse_recipe
from mlx_empire.run.what_next import next_commands, next_of_many
from mlx_empire.train.command import parser as train_parser

RECIPE = """\
model: {path: models/base}
data: {path: d, sequence_length: 8}
batch: {global_size: 4}
optimizer: {learning_rate: 0.001}
run: {dir: "runs/my run", steps: 3}
"""
FINAL = "runs/my run/final"


def typed(lines: list[str]) -> list[list[str]]:
    """The commands' words."""
    assert lines[0] == "next:"
    return [shlex.split(line, comments=True) for line in lines[1:]]


@pytest.mark.parametrize(
    ("tuning", "model", "adapter", "exported"),
    [
        ("full", FINAL, None, ["base", FINAL]),
        ("lora", "models/base", FINAL, ["merge", "runs/my run"]),
    ],
)
def test_a_run_ends_with_three_commands_and_an_adapter_with_one_more(
    tuning: str, model: str, adapter: str | None, exported: list[str]
) -> None:
    speak, look, use, *on = typed(next_commands(parse_recipe(RECIPE, "r", [f"tuning.type={tuning}"])))
    assert speak[0] == "mlx_lm.generate"
    options = setup_arg_parser().parse_args(speak[1:])
    assert (options.model, options.adapter_path) == (model, adapter)
    assert look == ["mlx-empire", "open", "runs/my run"]
    assert use[:2] == ["mlx-empire", "export"]
    way = export_parser().parse_args(use[2:])
    assert [way.way, str(way.source)] == exported
    assert len(on) == (adapter is not None)
    for words in on:
        again = train_parser().parse_intermixed_args(words[2:])
        assert str(again.recipe) == "runs/my run/recipe.yaml"
        assert again.overrides == ["tuning.start=runs/my run", "run.dir=runs/my run-2"]


def test_many_daughters_end_with_three_commands_about_one_that_is_finished() -> None:
    speak, look, use = typed(next_of_many(parse_recipe(RECIPE, "r", ["tuning.type=lora"]), "alice"))
    assert setup_arg_parser().parse_args(speak[1:]).adapter_path == "runs/my run/alice/final"
    (module,) = {verb.module for group in VERBS.values() for name, verb in group.items() if name == look[1]}
    assert import_module(module).read(look[1:]).folder == Path("runs/my run")
    assert export_parser().parse_args(use[2:]).source == Path("runs/my run/alice")


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_family_that_mlx_lm_does_not_have_speaks_by_our_own_command(tuning: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("falcon-7b")))
    recipe = parse_recipe(RECIPE, "r", [f"tuning.type={tuning}", f"model.path={tmp_path}"])
    alone, many = typed(next_commands(recipe))[0], typed(next_of_many(recipe, "alice"))[0]
    assert [words[:2] for words in (alone, many)] == [["mlx-empire", "chat"]] * 2
    asked = [str(read_chat(words[2:]).run) for words in (alone, many)]
    assert asked == ["runs/my run", "runs/my run/alice"]
