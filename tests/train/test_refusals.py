"""Bad input: one line that names the place and a remedy, exit code 64 (3: does not fit), and nothing written.

Most cases share a launch, one of a single process and one of two ranks; where it matters what the process itself
returns, or how a launch ends that is not agreed upon, a case has a launch to itself.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import Any

import pytest
from support.tiny_models import tiny_config
from train.launching import MODEL, RECIPE, Outcome, Workspace

# ---- inputs

# Recipes with one mistake each: what is replaced by what.
MISTAKES = {
    "key.yaml": ("micro_size", "microsize"),
    "section.yaml": ("schedule:", "scheduler:"),
    "twice.yaml": ("steps: 3", "steps: 3, steps: 4"),
    "type.yaml": ("global_size: 6", "global_size: six"),
    "range.yaml": ("1.0e-3", "-1.0e-3"),
    "torn.yaml": ("dir: run,", "dir: [run,"),
}
# Model folders with one change each in config.json.
CONFIGS: dict[str, dict[str, Any]] = {
    "family": {"model_type": "nonsuch"},
    "sizeless": {"hidden_size": "64"},
    "code": {"model_file": "model.py"},
    "wide": {"hidden_size": 128},
    "deep": {"num_hidden_layers": 6},
}
GOOD_LINE = '{"text": "We are met on this day."}\n'
FILES = {
    "recipe.yaml": RECIPE,
    "empty.yaml": "",
    "models/positions/config.json": json.dumps(tiny_config("gpt2")),
    "models/unwritable/config.json": json.dumps(
        tiny_config("llama", dim_model_base=32, scale_depth=1.4, scale_emb=12)
        | {"model_type": "minicpm", "tie_word_embeddings": True}
    ),
    **{f"models/{name}/config.json": json.dumps(tiny_config(name)) for name in ("rwkv7", "iquestloopcoder")},
    **{f"models/{name}/config.json": json.dumps(tiny_config(name)) for name in ("recurrent_gemma",)},
    "models/ai2/config.json": json.dumps({"model_type": "olmo", "d_model": 64, "n_layers": 2, "n_heads": 4}),
    "data/kind.jsonl": GOOD_LINE + '{"text": 5}\n',
    "data/torn.jsonl": GOOD_LINE * 2 + '{"text": "We are met\n',
    "data/other.jsonl": GOOD_LINE + '{"prompt": "a", "completion": "b"}\n',
    "data/empty.jsonl": "",
    "data/foreign.jsonl": '{"tokens": [5, 6, 7]}\n{"tokens": [5, 600, 7]}\n',
    "data/tokens.jsonl": '{"tokens": [5, 6, 7]}\n',
    "nothing/readme.md": "no rows here",
    "hosts/word": "# ours\nlocalhost slot=1\n",
    "hosts/note": "localhost slots=2 # memmory=4GiB\n",
    "hosts/unit": "localhost slots=2 # memory=512\n",
    "hosts/other": "king.example slots=2 # memory=512GiB\n",
    "hosts/tight": "localhost slots=2  # memory=1GiB limit=500MiB\n",
    "taken/final/thesis.txt": "the work of years",
    "file": "",
}


def write_inputs(made: Workspace) -> None:
    for name, text in FILES.items():
        made.write(name, text)
    for name, (old, new) in MISTAKES.items():
        assert old in RECIPE
        made.write(name, RECIPE.replace(old, new, 1))
    config = json.loads((MODEL / "config.json").read_text())
    for name in ("torn", "cut", "bare", "mute", *CONFIGS):
        shutil.copytree(MODEL, made.folder / "models" / name)
    for name, changes in CONFIGS.items():
        made.write(f"models/{name}/config.json", json.dumps(config | changes))
    made.write("models/torn/config.json", '{"model_type": "llama",')
    weights = made.folder / "models/cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:300_000])
    (made.folder / "models/bare/model.safetensors").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (made.folder / "models/mute" / name).unlink()


# ---- cases


@dataclass(frozen=True)
class Case:
    """The command's arguments, what its line must say, and its exit code."""

    arguments: str
    says: tuple[str, ...]
    code: int = 64


# Attention over so many positions takes gigabytes where scores are arrays.
LONG = "data.sequence_length=8192 numerics.attention=mask"
TOO_SMALL = ("(rank ", " and may use ", " MiB at ZeRO stage ")

RECIPES = {
    "no such recipe": Case("nowhere.yaml", ("nowhere.yaml: ", "recipes/quickstart.yaml")),
    "a folder as recipe": Case("models", ("models: a directory, not a recipe",)),
    "an empty recipe": Case("empty.yaml", ("empty.yaml:1: it is empty", "model")),
    "broken YAML": Case("torn.yaml", ("torn.yaml:", "not valid YAML")),
    "an unknown key": Case("key.yaml", ("key.yaml:3: ", "batch.microsize", "batch.micro_size")),
    "an unknown section": Case("section.yaml", ("section.yaml:5: ", "scheduler", "schedule")),
    "a key twice": Case("twice.yaml", ("twice.yaml:6: ", "steps")),
    "a wrong type": Case("type.yaml", ("type.yaml:3: ", "batch.global_size", "'six'")),
    "a value out of range": Case("range.yaml", ("range.yaml:4: ", "optimizer.learning_rate", "-0.001")),
    "nothing to go back to": Case(
        "recipe.yaml numerics.spikes=rollback",
        ("numerics.spikes", "rollback needs checkpoints", "run.save_every"),
    ),
    "micro and global size": Case(
        "recipe.yaml batch.micro_size=4", ("override 'batch.micro_size=4'", "6", "micro_size 3")
    ),
    "more cells than micro-batches": Case(
        "recipe.yaml batch.cells=7", ("override 'batch.cells=7'", "6 micro-batches", "use 6 or less")
    ),
    "an unknown override": Case(
        "recipe.yaml memory.zero_stag=2", ("override 'memory.zero_stag=2'", "memory.zero_stage")
    ),
    "an override that is none": Case("recipe.yaml steps", ("override 'steps'", "section.key=value")),
}
RANDOM = "model.init=random data.path=data/tokens.jsonl data.format=tokens"
MODELS = {
    "no model folder": Case("recipe.yaml model.path=nowhere", ("nowhere/config.json", "model.path")),
    "a damaged config.json": Case(
        "recipe.yaml model.path=models/torn", ("models/torn/config.json", "not valid JSON")
    ),
    "an unknown family": Case("recipe.yaml model.path=models/family", ("models/family", "'nonsuch'")),
    "a wrong type in config.json": Case(
        "recipe.yaml model.path=models/sizeless", ("models/sizeless", "'llama'")
    ),
    "code in a model folder": Case(
        "recipe.yaml model.path=models/code", ("models/code", "code is never run")
    ),
    "weights of another width": Case(
        "recipe.yaml model.path=models/wide", ("models/wide", "tensor ", "config.json")
    ),
    "a layer without weights": Case(
        "recipe.yaml model.path=models/deep", ("models/deep", "model.layers.5.", "is missing")
    ),
    "truncated weights": Case(
        "recipe.yaml model.path=models/cut", ("models/cut/model.safetensors", "damaged")
    ),
    "no weights": Case("recipe.yaml model.path=models/bare", ("models/bare", "safetensors")),
    "no tokenizer": Case("recipe.yaml model.path=models/mute", ("models/mute", "tokenizer")),
    "layers that share more than the hidden state": Case(
        f"recipe.yaml model.path=models/rwkv7 {RANDOM}", ("models/rwkv7", "share more than the hidden state")
    ),
    "layers that are never called": Case(
        f"recipe.yaml model.path=models/iquestloopcoder {RANDOM}", ("models/iquestloopcoder", "0 of 4 layers")
    ),
    "a class of mlx-lm that is no whole module": Case(
        f"recipe.yaml model.path=models/recurrent_gemma {RANDOM}",
        ("models/recurrent_gemma", "'recurrent_gemma'"),
    ),
    "OLMo in AI2's own layout": Case(
        f"recipe.yaml model.path=models/ai2 {RANDOM}", ("models/ai2", "d_model", "hf_olmo", "hidden_size")
    ),
    "packing with absolute positions": Case(
        "recipe.yaml model.path=models/positions model.init=random data.path=data/tokens.jsonl data.format=tokens "
        "data.packing=true",
        ("models/positions", "packing"),
    ),
    "a result that nothing opens": Case(
        "recipe.yaml model.path=models/unwritable model.init=random data.path=data/tokens.jsonl data.format=tokens",
        ("models/unwritable: a trained one cannot be exported", "lm_head.weight", "choose another model"),
    ),
}
DATA = {
    "no data": Case("recipe.yaml data.path=nowhere", ("data.path", "nowhere", "train.jsonl")),
    "a folder without rows": Case("recipe.yaml data.path=nothing", ("data.path", "nothing", "train.jsonl")),
    "an empty file": Case("recipe.yaml data.path=data/empty.jsonl", ("data/empty.jsonl", "empty")),
    "a line of a wrong type": Case(
        "recipe.yaml data.path=data/kind.jsonl", ("data/kind.jsonl:2: ", "string")
    ),
    "a line that is no JSON": Case("recipe.yaml data.path=data/torn.jsonl", ("data/torn.jsonl:3: ", "JSON")),
    "a line of another format": Case(
        "recipe.yaml data.path=data/other.jsonl", ("data/other.jsonl:2: ", "text")
    ),
    "a token that the model lacks": Case(
        "recipe.yaml data.path=data/foreign.jsonl data.format=tokens",
        ("data/foreign.jsonl:2: ", "600", "512"),
    ),
}
HOSTS = {
    "no hostfile": Case("--hosts nowhere recipe.yaml", ("nowhere: ", "hostfile")),
    "a word that mpirun does not know": Case(
        "--hosts hosts/word recipe.yaml", ("hosts/word:2: localhost", "'slot=1'", "slots=N")
    ),
    "an unknown annotation": Case(
        "--hosts hosts/note recipe.yaml", ("hosts/note:1: localhost", "use memory=")
    ),
    "a memory without unit": Case(
        "--hosts hosts/unit recipe.yaml", ("hosts/unit:1: localhost", "512", "GiB")
    ),
    "another machine's hostfile": Case(
        "--hosts hosts/other recipe.yaml", ("hosts/other: ", "is not in the hostfile", "king.example")
    ),
    "a node that is too small": Case(f"--hosts hosts/tight recipe.yaml {LONG}", TOO_SMALL, 3),
    "a hostfile after the overrides": Case(f"recipe.yaml {LONG} --hosts hosts/tight", TOO_SMALL, 3),
    "a hostfile between": Case(f"recipe.yaml --hosts hosts/tight {LONG}", TOO_SMALL, 3),
    "a list of shares of another length": Case(
        "recipe.yaml memory.shares=[1,2,3]", ("memory.shares", "one per rank")
    ),
}
OTHERS = {
    "no arguments": Case("", ("recipe",)),
    "an unknown option": Case("recipe.yaml --stage=3", ("--stage",)),
    "another's files in final": Case("recipe.yaml run.dir=taken", ("taken/final", "did not write")),
    "a file as the run's folder": Case("recipe.yaml run.dir=file", ("run.dir", "file")),
    "a file above the run's folder": Case("recipe.yaml run.dir=file/run", ("run.dir", "file")),
}
CASES = RECIPES | MODELS | DATA | HOSTS | OTHERS

# Errors that all ranks must agree on: found by rank 0 alone, by every rank, early and late.
ON_TWO = (
    "no such recipe",
    "an override that is none",
    "more cells than micro-batches",
    "no model folder",
    "truncated weights",
    "no tokenizer",
    "a line that is no JSON",
    "a word that mpirun does not know",
    "a node that is too small",
    "another's files in final",
    "a result that nothing opens",
)
# The same for these, which have a launch each.
APART_ON_TWO = ("no arguments", "packing with absolute positions", "a list of shares of another length")
APART_ON_ONE = ("an unknown key", "a node that is too small")


def command(name: str, launch: str) -> list[str]:
    """The case's arguments and, unless it has its own, a run's folder of its own."""
    words = CASES[name].arguments.split()
    if words and "run.dir=" not in CASES[name].arguments:
        at = words.index("recipe.yaml") + 1 if "recipe.yaml" in words else len(words)
        words.insert(at, f"run.dir={folder_of(name, launch)}")
    return words


def folder_of(name: str, launch: str) -> str:
    return f"runs-{launch}/{name.replace(' ', '-')}"


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace full of mistakes."""
    made = Workspace(tmp_path_factory.mktemp("refusals"))
    write_inputs(made)
    return made


@pytest.fixture(scope="module")
def on_one(bad: Workspace) -> dict[str, Outcome]:
    (outcomes,) = bad.train_many({name: command(name, "one") for name in CASES})
    return outcomes


@pytest.fixture(scope="module")
def on_two(bad: Workspace) -> list[dict[str, Outcome]]:
    return bad.train_many({name: command(name, "two") for name in ON_TWO}, ranks=2)


def check(case: Case, outcome: Outcome) -> None:
    """Its code, one line of ours that says what it must, and no word on standard output."""
    assert outcome.code == case.code, outcome.stderr
    assert len(outcome.said) == 1, outcome.stderr
    assert [part for part in case.says if part not in outcome.said[0]] == [], outcome.said[0]
    assert "Traceback" not in outcome.stderr
    assert outcome.stdout == ""


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_the_code(bad: Workspace, on_one: dict[str, Outcome], name: str) -> None:
    check(CASES[name], on_one[name])
    assert on_one[name].stderr.count("\n") == 1
    assert not (bad.folder / folder_of(name, "one")).exists()


@pytest.mark.parametrize("name", APART_ON_ONE)
def test_the_process_returns_the_code(bad: Workspace, name: str) -> None:
    ended = bad.train(*command(name, "process"))
    check(CASES[name], ended)
    assert ended.stderr.count("\n") == 1
    assert not (bad.folder / folder_of(name, "process")).exists()


@pytest.mark.parametrize("name", ON_TWO)
def test_two_ranks_say_it_once(bad: Workspace, on_two: list[dict[str, Outcome]], name: str) -> None:
    first, second = (outcomes[name] for outcomes in on_two)
    check(CASES[name], first)
    assert (second.code, second.stdout, second.stderr) == (CASES[name].code, "", "")
    assert not (bad.folder / folder_of(name, "two")).exists()


@pytest.mark.parametrize("name", APART_ON_TWO)
def test_two_ranks_leave_together(bad: Workspace, name: str) -> None:
    ended = bad.train(*command(name, "apart"), ranks=2)
    check(CASES[name], ended)
    assert "MPI_ABORT" not in ended.stderr
    assert not (bad.folder / folder_of(name, "apart")).exists()


def test_what_was_there_stays(
    bad: Workspace, on_one: dict[str, Outcome], on_two: list[dict[str, Outcome]]
) -> None:
    assert [path.name for path in (bad.folder / "taken").rglob("*")] == ["final", "thesis.txt"]
    assert (bad.folder / "taken/final/thesis.txt").read_text() == FILES["taken/final/thesis.txt"]
    assert (bad.folder / "file").read_text() == ""
    assert not (bad.folder / "run").exists()


def test_the_worst_node_is_named(
    bad: Workspace, on_one: dict[str, Outcome], on_two: list[dict[str, Outcome]]
) -> None:
    import socket

    for ranks, outcome in (
        (1, on_one["a node that is too small"]),
        (2, on_two[0]["a node that is too small"]),
    ):
        assert outcome.said[0].startswith(f"{socket.gethostname()} (rank ")
        assert f"may use {500 // ranks} MiB at" in outcome.said[0]
