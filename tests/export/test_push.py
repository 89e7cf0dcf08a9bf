"""`mlx-empire export push` against a Hub on the loopback: what is sent, and what is not."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support.hub_written import WrittenHub
from support.speaking import MODEL, finish, write_adapter

from mlx_empire.cli import main as cli
from mlx_empire.export.push import contents_of
from mlx_empire.formats.fetched import source_of
from mlx_empire.formats.model_card import model_card
from mlx_empire.model.build import build_model, describe
from mlx_empire.model.config import read_config
from mlx_empire.recipe.load import load_recipe, parse_recipe
from mlx_empire.run.finished import finished

NAME = "someone/alice"
FILES = {
    "README.md",
    "SHA256SUMS",
    "adapter_config.json",
    "adapters.safetensors",
    "environment.json",
    "training_config.yaml",
    "training_metrics.json",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[WrittenHub]:
    with WrittenHub() as made:
        monkeypatch.setenv("HF_ENDPOINT", made.address)
        monkeypatch.setenv("HF_TOKEN", "hf_stub")
        yield made


@pytest.fixture
def alice(tmp_path: Path) -> Path:
    """A finished run in a folder with a blank in its name, whose recipe names a host file and an address."""
    run = tmp_path / "Ann Smith" / "alice"
    write_adapter(run / "final", seed=100, rank=8)
    finish(run)
    told = json.loads((run / "recipe.yaml").read_text())
    told["run"] |= {"hosts": "/Users/ann/hosts.txt", "dir": str(run), "eval_every": 1}
    told["data"]["path"] = str(tmp_path / "Ann Smith" / "rows")
    told["report"] = {"notify": {"url": "https://hooks.example/secret"}}
    told["evaluation"] = {
        "sets": [{"path": str(tmp_path / "Ann Smith" / "facts.jsonl"), "metrics": ["loss"]}]
    }
    (run / "recipe.yaml").write_text(json.dumps(told))
    records = [
        {"step": 0, "eval_loss": 3.0, "scores": {"facts.loss": 2.0}},
        {"step": 1, "loss": 2.5, "tokens": 7},
    ]
    records.append({"step": 1, "eval_loss": 2.0, "scores": {"facts.loss": 2.5}})
    write_card(run, records)
    return run


def write_card(run: Path, records: list[dict[str, Any]]) -> None:
    """The model card of a run, and the records of which it tells."""
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    recipe = load_recipe(run / "recipe.yaml")
    config = read_config(MODEL)
    spec = describe(build_model(config, "tiny"), config, "tiny", "float32")
    card = model_card(recipe, spec, records, "sha256:0", None, source_of(recipe))
    (run / "final/README.md").write_text(card)


def genesis(folder: Path, **sections: Any) -> Path:
    """A finished full run whose recipe has more in its sections."""
    run = folder / "genesis"
    shutil.copytree(MODEL, run / "final")
    finish(run)
    told = json.loads((run / "recipe.yaml").read_text()) | {"tuning": {"type": "full"}}
    told = {name: told.get(name, {}) | sections.get(name, {}) for name in (told | sections)}
    (run / "recipe.yaml").write_text(json.dumps(told))
    write_card(run, [])
    return run


def refused(words: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        cli(["export", "push", *map(str, words)])
    assert ended.value.code in (64, 75)
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


def test_a_finished_adapter_goes_to_a_private_repository_whole(
    alice: Path, hub: WrittenHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["export", "push", str(alice), NAME, "--base", "karpathy/tinyllamas"]) == 0
    assert f"7 files are in {hub.address}/{NAME} (private)" in capsys.readouterr().out
    assert hub.private == {NAME: True}
    sent = hub.files[NAME]
    assert set(sent) == FILES
    assert sent["adapters.safetensors"] == (alice / "final/adapters.safetensors").read_bytes()
    assert json.loads(sent["adapter_config.json"]) == json.loads(
        (alice / "final/adapter_config.json").read_text()
    )
    sums = dict(reversed(line.split("  ")) for line in sent["SHA256SUMS"].decode().splitlines())
    assert sums == {n: hashlib.sha256(v).hexdigest() for n, v in sent.items() if n != "SHA256SUMS"}
    assert [one["step"] for one in json.loads(sent["training_metrics.json"])] == [0, 1, 1]
    assert json.loads(sent["environment.json"])["mlx"] == mx.__version__


def test_nothing_of_this_machine_is_sent(alice: Path, hub: WrittenHub, tmp_path: Path) -> None:
    assert cli(["export", "push", str(alice), NAME, "--base", "karpathy/tinyllamas"]) == 0
    texts = {n: v.decode() for n, v in hub.files[NAME].items() if n != "adapters.safetensors"}
    for name, text in texts.items():
        for word in (
            str(tmp_path),
            "Ann Smith",
            str(MODEL.parent),
            str(Path.home()) + "/",
            "hosts.txt",
            "secret",
        ):
            assert word not in text, (name, word)
    told = parse_recipe(texts["training_config.yaml"], "sent")
    assert (str(told.model.path), str(told.data.path), str(told.run.dir)) == (
        "karpathy/tinyllamas",
        "rows",
        "alice",
    )
    assert (told.run.hosts, told.report.notify) == (None, None)
    card = texts["README.md"]
    assert re.search(r"(?m)^base_model: karpathy/tinyllamas$", card)
    assert "mlx_lm.generate --model karpathy/tinyllamas --adapter-path THIS_FOLDER" in card
    assert "| facts.loss | 2.0000 | 2.5000 |" in card, "what got worse is named"


def test_a_base_that_has_no_name_on_the_hub_is_not_named(
    alice: Path, hub: WrittenHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["export", "push", str(alice), NAME]) == 0
    assert "--base OWNER/NAME names it" in capsys.readouterr().out
    assert "base_model" not in hub.files[NAME]["README.md"].decode()


def test_settings_of_a_tokenizer_say_nothing_of_where_it_lay(tmp_path: Path, hub: WrittenHub) -> None:
    run = genesis(tmp_path)
    path = run / "final/tokenizer_config.json"
    settings = json.loads(path.read_text())
    said = {
        "name_or_path": "/Users/ann/base",
        "special_tokens_map_file": "/Users/Ann Smith/base/special_tokens_map.json",
        "vocab_file": "~/models/vocab.json",
        "auto_map": {"AutoTokenizer": ["C:\\Users\\ann\\base--own.Tokenizer", None]},
    }
    kept = {"added_tokens_decoder": {"9": {"content": "/usr/bin"}}, "chat_template": "{{ '</a/b>' }} a/b"}
    path.write_text(json.dumps(settings | said | kept))
    generation = run / "final/generation_config.json"
    generation.write_text('{"_name_or_path": "/Users/ann/base", "eos_token_id":  2}')
    assert cli(["export", "push", str(run), NAME, "--base", "karpathy/tinyllamas"]) == 0
    sent = hub.files[NAME]
    names = {
        "name_or_path": "base",
        "special_tokens_map_file": "special_tokens_map.json",
        "vocab_file": "vocab.json",
        "auto_map": {"AutoTokenizer": ["base--own.Tokenizer", None]},
    }
    assert json.loads(sent["tokenizer_config.json"]) == settings | names | kept
    assert json.loads(sent["generation_config.json"]) == {"_name_or_path": "base", "eos_token_id": 2}
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        assert sent[name] == (run / "final" / name).read_bytes()


def test_a_template_with_a_place_of_this_machine_is_not_sent(
    tmp_path: Path, hub: WrittenHub, capsys: pytest.CaptureFixture[str]
) -> None:
    run = genesis(tmp_path)
    (run / "final/chat_template.jinja").write_text(f"{{% include '{MODEL}/x' %}}")
    assert "chat_template.jinja: a path of this machine is left in it" in refused([run, NAME], capsys)
    (run / "final/chat_template.jinja").unlink()
    (run / "final/generation_config.json").write_text("{")
    assert "generation_config.json: not valid JSON" in refused([run, NAME], capsys)
    assert NAME not in hub.files


@pytest.mark.parametrize(
    ("base", "source", "named"),
    [
        ("base", None, "someone/genesis_base"),
        ("SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M@0123abc", None),
        ("/Users/Ann Smith/base", None, "someone/base"),
        ("models/base", None, "models/base-2"),
    ],
)
def test_a_base_s_path_becomes_its_name_and_no_other_word_changes(
    base: str, source: str | None, named: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/")
    scorer = {"path": "facts.jsonl", "metrics": ["scorer"], "scorer": "/Users/Ann Smith/own.py:share"}
    run = genesis(
        tmp_path,
        model={"path": base, "source": source},
        evaluation={"sets": [scorer]},
        run={"dir": str(tmp_path / "base model base-x"), "steps": 1, "eval_every": 1},
    )
    made = contents_of(finished(run, "FROM"), named).contents
    known = named or str(source).partition("@")[0]
    before = load_recipe(run / "recipe.yaml")
    texts = {name: bytes(made[name]).decode() for name in ("README.md", "training_config.yaml")}
    told = parse_recipe(texts["training_config.yaml"], "sent")
    assert str(told.model.path) == known
    assert told.evaluation.sets[0].scorer == "own.py:share"
    assert told.run.dir == Path("base model base-x")
    assert (told.model.source, told.data) == (before.model.source, before.data)
    card = texts["README.md"]
    assert card.startswith(f"---\nbase_model: {known}\n")
    assert f"# base model base-x\n\nfull fine-tuning of `{known}`, by mlx_empire" in card
    assert f"| base | `{known}` |" in card
    assert source is None or f"| fetched from | `{source}` |" in card
    assert "| written by | mlx_empire" in card
    for text in texts.values():
        assert "Ann" not in text
        assert str(tmp_path) not in text
        assert not re.search(r"models/base(?!-2)", text)


def test_what_cannot_be_pushed_is_one_line(
    alice: Path,
    hub: WrittenHub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "OUT: alice: expected OWNER/NAME" in refused([alice, "alice"], capsys)
    assert "no run of this program made it" in refused([MODEL, NAME], capsys)
    hub.private["someone/open"] = False
    hub.files["someone/open"] = {}
    assert "OUT: someone/open: is public already; say --public" in refused([alice, "someone/open"], capsys)
    assert hub.files["someone/open"] == {}
    hub.refuses = True
    assert f"OUT: {NAME}: the Hub lets you not write there (403); `hf auth login`" in refused(
        [alice, NAME], capsys
    )
    card = alice / "final/README.md"
    text = card.read_text()
    card.write_text(text.replace("tags:", "tags: ["))
    assert f"{card}: its head is not what the Hub reads" in refused([alice, NAME], capsys)
    card.unlink()
    assert f"{card}: the result has no model card" in refused([alice, NAME], capsys)
    card.write_text(text)
    (alice / "COMPLETE").unlink()
    assert "this run is not finished" in refused([alice, NAME], capsys)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (alice / "COMPLETE").write_text("\n")
    assert "the Hub was not reached" in refused([alice, NAME], capsys)


def test_a_frozen_result_that_was_changed_is_not_pushed(
    alice: Path, hub: WrittenHub, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlx_empire.formats.seal import seal_folder, unseal

    seal_folder(alice / "final", {})
    assert cli(["export", "push", str(alice), NAME]) == 0
    config = alice / "final/adapter_config.json"
    config.chmod(0o600)
    config.write_text(config.read_text() + " ")
    assert "adapter_config.json" in refused([alice, "someone/other"], capsys)
    assert "someone/other" not in hub.files
    unseal(alice / "final")
