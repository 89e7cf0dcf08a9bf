"""`mlx-empire`: what there is, help and typos without MLX, other trainers' options, and files found by name."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from mlx_lm.lora import build_parser

from mlx_empire import __version__, cli
from mlx_empire.errors import UserError
from mlx_empire.launch import command as launch
from mlx_empire.recipe.arguments import RecipeArguments
from mlx_empire.recipe.explain import leaf_fields
from mlx_empire.recipe.foreign import KEYS, answer_to
from mlx_empire.recipe.packaged import HOSTS, RECIPES, host_file, packaged, recipe_file

ROOT = Path(__file__).resolve().parents[2]
VERBS = {name: verb for group in cli.VERBS.values() for name, verb in group.items()}
# What is typed wrongly: exit code 64, one line.
TYPOS = {
    "capacity": ["tiny.yaml", "--ladder", "--matrix"],
    "compare": ["one"],
    "init": ["tiny"],
    "daughters": ["tiny.yaml", "--people", "people", "--together", "0"],
}
# Run in a process of its own: what has been imported once each verb was asked wrongly, and for help.
PROGRAM = """
import contextlib, importlib, io, json, sys
from mlx_empire.cli import main, VERBS
found = {}
def ask(name, words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as left:
            code = left.code
    large = [one for one in ("mlx", "mlx.core", "mlx_lm", "transformers", "torch") if one in sys.modules]
    found[name] = [code, out.getvalue(), err.getvalue(), large]
ask("", [])
for name, words in json.loads(sys.argv[1]).items():
    ask(name + " --help", [name, "--help"])
    ask(name, [name, *words])
for group in VERBS.values():
    for verb in group.values():
        with contextlib.suppress(ModuleNotFoundError):  # a verb that is a file has none
            importlib.import_module(verb.module.rpartition(".")[0] + ".__main__")
ask("as modules", ["--version"])
print(json.dumps(found))
"""


def test_help_and_wrong_words_import_neither_mlx_nor_transformers() -> None:
    """Of every verb, in one fresh process: what one imported would be seen after all that follow."""
    asked = {name: TYPOS.get(name, ["tiny.yaml", "--nonsense"]) for name in VERBS}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(asked)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert {name for name, (*_, large) in found.items() if large} == set()
    for name in asked:
        code, out, err, _ = found[f"{name} --help"]
        assert (code, err) == (0, ""), name
        assert out.startswith(f"usage: mlx-empire {name} ")
        code, out, err, _ = found[name]
        assert (code, out, err.count("\n")) == (64, "", 1), (name, err)
        assert err.startswith("mlx_empire: ")
        assert err.endswith(f"see mlx-empire {name} --help\n")


def test_the_test_above_would_see_mlx() -> None:
    wrong = PROGRAM.replace("import contextlib", "import mlx.core, contextlib")
    done = subprocess.run([sys.executable, "-c", wrong, "{}"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)[""][3] == ["mlx", "mlx.core"]


def test_without_a_verb_it_tells_each_in_a_line_by_what_one_wants(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for wish, verbs in cli.VERBS.items():
        assert wish in lines
        for name, verb in verbs.items():
            assert f"  {name:<10} {verb.sentence}" in lines
    assert max(map(len, lines)) <= 80
    assert lines[-1].split() == ["mlx-empire", "init"], "each command names the next"


def test_a_verb_that_is_not_there_is_named_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 64
    assert capsys.readouterr().err == "mlx_empire: 'trian': no such verb; did you mean train?\n"
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mlx-empire {__version__}\n"


def test_every_verb_with_a_recipe_takes_it_first_and_hosts_by_the_same_option() -> None:
    made = {name: import_module(verb.module) for name, verb in VERBS.items() if not verb.words}
    parsers = {name: module.parser() for name, module in made.items() if hasattr(module, "parser")}
    recipes = {name for name, parser in parsers.items() if isinstance(parser, RecipeArguments)}
    assert recipes == {"train", "launch", "daughters", "sweep", "capacity", "verify", "inspect"}
    for name in recipes:
        usage = parsers[name].format_usage()
        subject = r"RECIPE\|DATA" if name == "inspect" else "recipe"
        assert re.search(rf"{subject} \[key=value \.\.\.\]", " ".join(usage.split()))
        assert "--hosts FILE" in usage


@pytest.mark.parametrize("hosts", [["--hosts", "hosts/local.txt"], ["--hosts", "local"]])
def test_launch_takes_recipe_and_hosts_in_the_common_order_and_in_the_old_one(
    hosts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where neither file is: those of the package are meant
    new = launch.read(["tiny", "run.steps=3", *hosts, "--dry-run"])
    old = launch.read(["hosts/local.txt", "recipes/tiny.yaml", "run.steps=3", "--dry-run"])
    assert vars(new) == vars(old)
    assert new.recipe.samefile(ROOT / "recipes/tiny.yaml")
    assert new.hosts.samefile(ROOT / "hosts/local.txt")
    assert new.overrides == ["run.steps=3"]


def test_a_file_of_that_path_goes_before_one_that_comes_with_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny").touch()
    assert recipe_file("tiny") == Path("tiny")
    assert recipe_file("recipes/tiny.yaml").read_text() == (ROOT / "recipes/tiny.yaml").read_text()
    for other in ("tiny.txt", "elsewhere/tiny.yaml", "tinny", "", "x" * 5000, "a\0b"):
        assert recipe_file(other) == Path(other)
    assert host_file("empire").read_text() == (ROOT / "hosts/empire.txt").read_text()


@pytest.mark.parametrize(("kind", "ending"), [(RECIPES, "yaml"), (HOSTS, "txt")])
def test_what_comes_with_the_package_is_what_lies_in_the_repository(kind: str, ending: str) -> None:
    assert {file.name for file in packaged(kind).values()} == {
        file.name for file in (ROOT / kind).glob(f"*.{ending}")
    }


def test_each_option_of_mlx_lms_trainer_is_answered() -> None:
    """By that trainer's own parser, but for what a recipe has nothing to do with."""
    theirs = {
        name for action in build_parser()._actions for name in action.option_strings if name[:2] == "--"
    }
    assert {name for name in theirs if answer_to(name) is None} == {"--help"}


def test_a_common_option_of_transformers_is_answered_with_the_key_that_says_it() -> None:
    expected = {
        "--gradient_checkpointing": "memory.gradient_checkpointing",
        "--per_device_train_batch_size=4": "batch.micro_size",
        "--num_train_epochs": "run.steps",
        "--learning_rate": "optimizer.learning_rate",
        "--lr_scheduler_type": "schedule.type",
        "--warmup_ratio": "schedule.warmup",
        "--output_dir": "run.dir",
        "--save_steps": "run.save_every",
        "--max_grad_norm": "optimizer.clip_norm",
    }
    for option, key in expected.items():
        answer = answer_to(option)
        assert answer is not None
        assert f"write {key}=" in answer
    assert set(KEYS.values()) <= leaf_fields().keys()


@pytest.mark.parametrize("word", ["run.steps=5", "recipe.yaml", "--", "--nonsense", "-x"])
def test_other_words_are_left_to_the_verb(word: str) -> None:
    assert answer_to(word) is None


def test_a_verbs_own_option_is_never_taken_for_another_trainers() -> None:
    """`--seeds` of verify, `--steps` and the like are this program's."""
    made = RecipeArguments("verify", "about", hosts="hosts")
    made.add_argument("--seed", type=int)
    assert made.parse_intermixed_args(["r.yaml", "--seed", "3"]).seed == 3
    with pytest.raises(UserError, match=r"^--lr: here a key of the recipe: write optimizer\.learning_rate="):
        made.parse_intermixed_args(["r.yaml", "--lr", "1e-4"])


@pytest.mark.parametrize("verb", ["train", "export"])
def test_a_verb_that_was_a_file_is_called_as_before(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        import_module(f"mlx_empire.{verb}").main(["merge", "--nonsense"])
    assert ended.value.code == 64
    assert capsys.readouterr().err.startswith("mlx_empire: ")
