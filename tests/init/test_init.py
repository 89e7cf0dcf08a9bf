"""`mlx-empire init`: which recipes there are and whether they fit, and one for a model and data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml
from support.saying import said

from mlx_empire.init.write import HELD_OUT, filled, template
from mlx_empire.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
MODEL, DATA = ROOT / "tests/fixtures/tiny-llama-260k", ROOT / "tests/fixtures/wordnet"
SMALL = "small slots=1 # memory=1GiB limit=10MiB\n"


@pytest.fixture
def say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """What `mlx-empire WORDS` prints in an empty folder; it must end with `code`."""
    monkeypatch.chdir(tmp_path)

    return partial(said, capsys)


def answers(text: str) -> dict[str, str]:
    """By recipe, whether it fits."""
    rows = [re.split(r" {2,}", line.rstrip()) for line in text.partition("\n\n")[0].splitlines()]
    return {name: answer for name, answer, _ in rows[1:]}


@pytest.mark.slow
def test_the_list_has_every_recipe_and_what_the_capacity_report_says_of_it(say: Callable[..., str]) -> None:
    found = answers(say("init", "--hosts", "empire"))
    assert found.keys() == {file.stem for file in (ROOT / "recipes").glob("*.yaml")}
    for name in ("scout", "daughter"):
        report = json.loads(say("capacity", name, "--hosts", "empire", "--json"))
        assert found[name] == {"fits": "yes", "tight": "tight", "no": "no"}[report["verdict"]]
    assert found["scout"] == "yes"
    assert "models/smollm2-135m" in found["quickstart"], "what is not there cannot be planned for"


@pytest.mark.slow
def test_with_a_model_it_asks_whether_that_fits(say: Callable[..., str]) -> None:
    Path("small.txt").write_text(SMALL)
    found = answers(say("init", "--model", MODEL, "--hosts", "small.txt"))
    assert found.keys() == {file.stem for file in (ROOT / "recipes").glob("*.yaml")}
    assert set(found.values()) == {"no"}


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml")))
def test_a_recipe_is_written_for_a_model_and_data_and_the_last_line_is_the_next_command(
    say: Callable[..., str], name: str
) -> None:
    said = say("init", name, "--model", MODEL, "--data", DATA, "--out", "my.yaml")
    assert said.splitlines()[-1] == "  mlx-empire inspect my.yaml"
    before, made = load_recipe(ROOT / f"recipes/{name}.yaml"), load_recipe(Path("my.yaml"))
    assert (made.model.path, made.data.path, made.run.dir) == (MODEL, DATA, Path("runs/my"))
    assert (made.model.architecture, made.data.format) == (None, "auto")
    for section in ("tuning", "batch", "optimizer", "schedule", "memory"):
        assert getattr(made, section) == getattr(before, section)
    text = Path("my.yaml").read_text()
    assert text.splitlines()[0].startswith(f"# Made by `mlx-empire init {name}`")
    assert "rows" in text or "sequences" in text or name == "tiny", "comments of other keys stay"
    assert (
        yaml.safe_load(text)["batch"] == yaml.safe_load((ROOT / f"recipes/{name}.yaml").read_text())["batch"]
    )


def test_a_path_that_yaml_would_read_otherwise_comes_back_as_it_was(
    say: Callable[..., str], tmp_path: Path
) -> None:
    for folder in ("a: b #c", "yes"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a: b #c" / "config.json").write_bytes((MODEL / "config.json").read_bytes())
    (tmp_path / "yes" / "train.jsonl").write_text('{"text": "x"}\n')
    say("init", "tiny", "--model", "a: b #c", "--data", "yes", "--out", "my.yaml")
    made = load_recipe(Path("my.yaml"))
    assert (made.model.path, made.data.path) == (Path("a: b #c"), Path("yes"))


@pytest.mark.parametrize("data", [".", "..", "../mine"])
def test_the_folder_that_one_is_in_may_be_the_data_or_stand_in_it(
    data: str, say: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine" / "here").mkdir(parents=True)
    (tmp_path / "mine" / "train.jsonl").write_text('{"text": "x"}\n')
    monkeypatch.chdir(tmp_path / "mine" / ("here" if data == ".." else ""))
    told = say("init", "tiny", "--model", MODEL, "--data", data)
    assert told.splitlines()[-1] == "  mlx-empire inspect mine.yaml"
    assert load_recipe(Path("mine.yaml")).run.dir == Path("runs/mine")


def test_rows_are_held_out_where_the_data_has_none_for_the_evaluations_that_are_asked_for(
    say: Callable[..., str],
) -> None:
    for data, share in ((DATA, None), (DATA / "train.jsonl", 0.1)):
        say("init", "tiny", "--model", MODEL, "--data", data, "--out", f"{data.stem}.yaml")
        made = load_recipe(Path(f"{data.stem}.yaml"))
        assert made.data.validation_split == share
        assert made.run.eval_every is not None
    for name in (file.stem for file in (ROOT / "recipes").glob("*.yaml")):
        text = filled(template(name), {}, "# title", {"data.format": HELD_OUT})
        assert yaml.safe_load(text)["data"]["validation_split"] == 0.1


def test_a_file_that_is_there_is_never_overwritten(say: Callable[..., str]) -> None:
    Path("wordnet.yaml").write_text("the work of years")
    said = say("init", "tiny", "--model", MODEL, "--data", DATA, code=64)
    assert said == (
        "mlx_empire: --out: wordnet.yaml: is there already, and is left as it is; choose another name\n"
    )
    assert Path("wordnet.yaml").read_text() == "the work of years"
    Path("link.yaml").symlink_to("wordnet.yaml")
    say("init", "tiny", "--model", MODEL, "--data", DATA, "--out", "link.yaml", code=64)
    assert Path("wordnet.yaml").read_text() == "the work of years"


def test_what_does_not_fit_is_written_and_sent_to_the_report(say: Callable[..., str]) -> None:
    Path("small.txt").write_text(SMALL)
    said = say("init", "tiny", "--model", MODEL, "--data", DATA, "--out", "my.yaml", "--hosts", "small.txt")
    assert said.splitlines()[-1] == "  mlx-empire capacity my.yaml --hosts small.txt"
    assert "does not fit" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tinny", "--model", MODEL, "--data", DATA], "did you mean tiny?"),
        (["tiny", "--model", "nowhere", "--data", DATA], "nowhere"),
        (["tiny", "--model", MODEL, "--data", "nowhere"], "nowhere"),
        (["tiny", "--model", MODEL], "say --model FOLDER and --data PATH"),
        (["--data", DATA], "say which recipe"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(
    say: Callable[..., str], words: list[object], said: str
) -> None:
    text = say("init", *words, code=64)
    assert said in text
    assert text.count("\n") == 1
    assert list(Path().iterdir()) == []
