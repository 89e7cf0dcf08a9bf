"""What `fetch` brings is what the Hub has, whatever the network does meanwhile; what is not is refused by name."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.hub import COMMIT, StubHub
from support.planning import catalog_spec

from mlx_empire.errors import UserError
from mlx_empire.fetch import command, hub
from mlx_empire.formats.fetched import RECORD, naming_the_fetch, refuse_other_source, source_of
from mlx_empire.formats.model_card import model_card
from mlx_empire.recipe.load import load_recipe

REPOSITORY = "owner/small-model"
WEIGHTS = "model-00001-of-00002.safetensors"
MORE = "model-00002-of-00002.safetensors"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "LICENSE": b"the licence",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    WEIGHTS: bytes(range(256)) * 4096,
    MORE: b"\1\2\3" * 50_000,
}
LEFT = {  # never fetched: code, pickles, another copy of the weights, what lies outside the folder
    "modeling_evil.py": b"print()",
    "pytorch_model.bin": b"pickle",
    "original/model.safetensors": b"again",
    "consolidated.safetensors": b"again",
    "../outside.json": b"outside",
    "README.md": b"a page",
}


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(
        constants, "DOWNLOAD_CHUNK_SIZE", 4096
    )  # where it goes on, it does so after a whole chunk
    with StubHub(REPOSITORY, FILES | LEFT, large=(WEIGHTS, MORE)) as made:
        monkeypatch.setenv("HF_ENDPOINT", made.address)
        yield made


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{path: {tmp_path}/models/small, source: {REPOSITORY}@main}}\n"
        "data: {path: data, sequence_length: 8}\nbatch: {global_size: 1}\n"
        f"optimizer: {{learning_rate: 1e-3}}\nrun: {{dir: {tmp_path}/run, steps: 1}}\n"
    )
    return path


def fetch(recipe: Path, *words: str) -> int:
    """The command's exit code."""
    try:
        return command.main([str(recipe), *words])
    except SystemExit as error:
        return int(str(error.code))


def held(tmp_path: Path) -> dict[str, bytes]:
    """Every file of the model's folder but the record and the client's own notes."""
    folder = tmp_path / "models/small"
    return {
        name: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not (name := str(path.relative_to(folder))).startswith((".cache", RECORD))
    }


def test_all_that_training_reads_arrives_and_nothing_else(
    stub: StubHub, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch(recipe) == 0
    assert held(tmp_path) == FILES
    assert not (tmp_path / "models/outside.json").exists()
    record = json.loads((tmp_path / "models/small" / RECORD).read_text())
    assert (record["source"], record["revision"]) == (f"{REPOSITORY}@main", COMMIT)
    assert record["files"][WEIGHTS]["sha256"] == hashlib.sha256(FILES[WEIGHTS]).hexdigest()
    said = capsys.readouterr().out
    assert "6 files, 1.14 MiB" in said
    assert f"licence: stub-licence, see {stub.address}/{REPOSITORY}" in said
    assert "are free there" in said


def test_a_cut_connection_is_gone_on_with_where_it_was_cut(
    stub: StubHub, recipe: Path, tmp_path: Path
) -> None:
    stub.cut = {WEIGHTS}
    assert fetch(recipe) == 0
    assert held(tmp_path) == FILES
    half = len(FILES[WEIGHTS]) // 2
    assert [wanted for name, wanted in stub.ranges if name == WEIGHTS] == [None, f"bytes={half}-"]


def test_a_wrong_byte_is_refused_by_file_and_the_next_attempt_fetches_only_that_file(
    stub: StubHub, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.wrong = {MORE}
    assert fetch(recipe) == 65
    said = capsys.readouterr().err
    assert f"{tmp_path}/models/small/{MORE}: sha256" in said
    assert len(said.splitlines()) == 1 or "run the same command again" in said.splitlines()[-1]
    assert held(tmp_path) == {name: data for name, data in FILES.items() if name != MORE}
    assert not (tmp_path / "models/small" / RECORD).exists()
    stub.wrong, stub.ranges[:] = set(), []
    assert fetch(recipe) == 0
    assert [name for name, _ in stub.ranges] == [MORE]
    assert held(tmp_path) == FILES


def test_a_wrong_byte_of_a_small_file_is_found_by_gits_digest(
    stub: StubHub, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.wrong = {"config.json"}
    assert fetch(recipe) == 65
    assert "config.json: git_sha1" in capsys.readouterr().err


def test_a_byte_that_changed_on_the_disk_is_found_by_the_same_command(
    stub: StubHub, recipe: Path, tmp_path: Path
) -> None:
    assert fetch(recipe) == 0
    file = tmp_path / "models/small" / WEIGHTS
    file.write_bytes(b"\7" + file.read_bytes()[1:])
    assert fetch(recipe) == 65
    assert not (tmp_path / "models/small" / RECORD).exists()
    assert fetch(recipe) == 0
    assert held(tmp_path) == FILES


def test_what_only_an_earlier_revision_had_goes_and_what_is_somebody_elses_is_refused(
    stub: StubHub, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "models/small"
    stub.files["model.safetensors.index.json"] = b"{}"
    assert fetch(recipe) == 0
    del stub.files["model.safetensors.index.json"]
    (folder / "notes.txt").write_text("mine")
    assert fetch(recipe, f"model.source={REPOSITORY}@{COMMIT}") == 0
    assert held(tmp_path) == FILES | {"notes.txt": b"mine"}
    (folder / "model.safetensors").write_bytes(b"of another model")
    assert fetch(recipe, f"model.source={REPOSITORY}@{COMMIT}") == 64
    assert f"{folder}/model.safetensors: is not of {REPOSITORY}@{COMMIT}" in capsys.readouterr().err


def test_what_does_not_fit_is_refused_before_anything_is_fetched(
    stub: StubHub,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(hub, "free_bytes", lambda _: 1 << 20)
    assert fetch(recipe) == 3
    assert "1.14 MiB are still to fetch, and 1.00 MiB are free" in capsys.readouterr().err
    assert stub.ranges == []
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("words", "state", "code", "said"),
    [
        ([], {"gated": True}, 64, "its licence must be accepted first: see {page}, then `hf auth login`"),
        (["model.source=owner/nobody@main"], {}, 64, "there is no such model"),
        ([f"model.source={REPOSITORY}@v9"], {}, 64, "there is no such revision; see {page}/commits/main"),
        (["model.source=small-model"], {}, 64, "model.source"),
        (["model.source=null"], {}, 64, "write source: owner/name@revision"),
        (["--everywhere"], {}, 64, "add --hosts HOSTFILE"),
        (["--nonsense"], {}, 64, "unrecognized arguments: --nonsense"),
    ],
)
def test_what_cannot_be_fetched_is_refused_in_one_line(
    stub: StubHub,
    recipe: Path,
    words: list[str],
    state: dict[str, bool],
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in state.items():
        setattr(stub, name, value)
    assert fetch(recipe, *words) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert said.format(page=f"{stub.address}/{REPOSITORY}") in line


def test_a_hub_that_is_not_there_is_worth_another_attempt(
    stub: StubHub, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    assert fetch(recipe) == 75
    assert "the Hub was not reached" in capsys.readouterr().err


def test_parts_that_a_killed_process_left_are_room_and_go(
    stub: StubHub, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / "models/small/.cache/huggingface/download/x.incomplete"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"\0" * (1 << 20))
    monkeypatch.setattr(hub, "free_bytes", lambda _: 1 << 20)
    assert fetch(recipe) == 0
    assert not left.exists()


def test_two_processes_do_not_fetch_into_one_folder(
    stub: StubHub, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "models/small/.cache/huggingface/fetching.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as held_by_another:
        fcntl.flock(held_by_another, fcntl.LOCK_EX)
        assert fetch(recipe) == 64
    assert "another process fetches into it" in capsys.readouterr().err
    assert held(tmp_path) == {}


def test_a_dry_run_says_all_of_it_and_fetches_nothing(
    stub: StubHub, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch(recipe, "--dry-run") == 0
    assert "1.14 MiB to fetch" in capsys.readouterr().out
    assert not (tmp_path / "models").exists()


def test_what_was_fetched_from_elsewhere_is_not_trained(stub: StubHub, recipe: Path) -> None:
    assert fetch(recipe) == 0
    refuse_other_source(load_recipe(recipe))
    refuse_other_source(load_recipe(recipe, ["model.source=null"]))
    with pytest.raises(UserError, match=f"was fetched from {REPOSITORY}@main; fetch it again"):
        refuse_other_source(load_recipe(recipe, [f"model.source={REPOSITORY}@v2"]))


def test_a_missing_folder_names_the_command(recipe: Path) -> None:
    with (
        pytest.raises(UserError, match=rf"fetch RECIPE` brings it from {REPOSITORY}@main"),
        naming_the_fetch(load_recipe(recipe)),
    ):
        raise UserError("config.json: No such file or directory")
    with (
        pytest.raises(UserError, match=r"with model.source: owner/name@revision, `mlx-empire"),
        naming_the_fetch(load_recipe(recipe, ["model.source=null"])),
    ):
        raise UserError("config.json: No such file or directory")


def test_a_card_names_the_commit_that_was_fetched_else_what_the_recipe_says(
    stub: StubHub, recipe: Path
) -> None:
    asked = load_recipe(recipe)
    tiny_spec = catalog_spec("llama-3.2-1b", asked)
    assert source_of(asked) == f"{REPOSITORY}@main"
    assert fetch(recipe) == 0
    assert source_of(asked) == f"{REPOSITORY}@{COMMIT}"
    card = model_card(asked, tiny_spec, [], "digest", None, source_of(asked))
    assert f"\nbase_model: {REPOSITORY}\n" in card
    assert f"| fetched from | `{REPOSITORY}@{COMMIT}` |" in card
    assert f"\nbase_model: {asked.model.path}\n" in model_card(asked, tiny_spec, [], "digest", None)
