"""A model folder is data: pickles in it are not opened, code in it is not run, names in it do not leave it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from train.launching import MODEL, SPEECHES, WORDNET, Outcome, Workspace

TAKEN = "TAKEN"  # what every bait leaves in the workspace when it is taken


class Bomb:
    """Whoever unpickles it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


class Bait:
    """Makes baited copies of the tiny model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.command = f"touch {folder / TAKEN}"
        self.code = f"import os\nos.system({self.command!r})\nclass Evil:\n    pass\n"

    def model(self, name: str) -> Path:
        """A copy with pickles and modules beside the real files."""
        made = self.folder / name
        shutil.copytree(MODEL, made)
        for file in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pth", "vocab.pkl"):
            (made / file).write_bytes(pickle.dumps(Bomb(self.command)))
        for file in (
            "modeling_evil.py",
            "configuration_evil.py",
            "tokenization_evil.py",
            "llama.py",
            "__init__.py",
        ):
            (made / file).write_text(self.code)
        return made

    def edit(self, file: Path, **changes: object) -> None:
        """Change keys of a JSON file."""
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(scope="module")
def outcomes(workspace: Workspace) -> dict[str, Outcome]:
    """One process trains on, or refuses, one baited folder after the other."""
    bait = Bait(workspace.folder)
    bait.model("beside")

    remote = bait.model("remote")
    auto = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    bait.edit(remote / "config.json", auto_map=auto, trust_remote_code=True)
    tokenizer = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    bait.edit(remote / "tokenizer_config.json", auto_map=tokenizer, trust_remote_code=True)

    unknown = bait.model("unknown")
    bait.edit(unknown / "config.json", auto_map=auto, model_type="evil")

    custom = bait.model("custom")
    bait.edit(custom / "tokenizer_config.json", auto_map=tokenizer, tokenizer_class="EvilTokenizer")
    (custom / "tokenizer.json").unlink()

    bait.edit(bait.model("model-file") / "config.json", model_file="modeling_evil.py")

    (bait.model("pickles") / "model.safetensors").unlink()

    template = "{{ cycler.__init__.__globals__.os.system('" + bait.command + "') }}"
    bait.edit(bait.model("template") / "tokenizer_config.json", chat_template=template)

    commands = {
        name: [name, SPEECHES, "text"] for name in ("beside", "remote", "unknown", "custom", "pickles")
    }
    commands |= {"model-file": ["model-file", SPEECHES, "text"], "template": ["template", WORDNET, "chat"]}
    return workspace.train_many(
        {
            name: [
                "recipe.yaml",
                f"model.path={model}",
                f"data.path={data}",
                f"data.format={kind}",
                f"run.dir=run-{name}",
                "run.steps=1",
            ]
            for name, (model, data, kind) in commands.items()
        }
    )[0]  # fmt: skip


@pytest.mark.parametrize("name", ["beside", "remote"])
def test_bait_beside_good_files_is_passed_over(
    outcomes: dict[str, Outcome], workspace: Workspace, name: str
) -> None:
    assert outcomes[name].code == 0, outcomes[name].stderr
    assert (workspace.folder / f"run-{name}" / "COMPLETE").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("unknown", "model_type 'evil'"),
        ("custom", "no tokenizer can be loaded from it"),
        ("model-file", "code is never run"),
        ("pickles", "its weights are pickles, which are never read"),
        ("template", "template"),
    ],
)
def test_a_folder_that_needs_code_is_refused(
    outcomes: dict[str, Outcome], workspace: Workspace, name: str, said: str
) -> None:
    assert outcomes[name].code == 64, outcomes[name].stderr
    (line,) = outcomes[name].said
    assert said in line
    assert "Traceback" not in outcomes[name].stderr
    assert not (workspace.folder / f"run-{name}").exists()


def test_no_bait_was_taken(outcomes: dict[str, Outcome], workspace: Workspace) -> None:
    assert len(outcomes) == 7
    assert not (workspace.folder / TAKEN).exists()


def test_the_bait_works(tmp_path: Path) -> None:
    """Taken as it is meant to be, each kind leaves its mark."""
    bait = Bait(tmp_path)
    folder = bait.model("model")
    for take in (
        lambda: pickle.loads((folder / "model.pt").read_bytes()),
        lambda: exec((folder / "modeling_evil.py").read_text()),
    ):
        take()
        (tmp_path / TAKEN).unlink()
