"""What stands beside the weights in an exported folder: tokenizer, templates, and nothing dangerous."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from mlx_lm.utils import load_model
from support.exporting import Write, export_all, export_llama, llama_folder
from support.tiny_models import tiny_config, tiny_model
from transformers import AutoTokenizer

from mlx_empire.errors import UserError
from mlx_empire.formats.export_folder import FolderWriter
from mlx_empire.formats.source import RandomSource
from mlx_empire.formats.staging import refuse_uncopied

FIXTURES = Path(__file__).parents[1] / "fixtures"


def test_only_plain_known_files_are_copied(write_folder: Write, tmp_path: Path) -> None:
    folder = llama_folder(write_folder)
    allowed = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
    for name in allowed:
        (folder / name).write_text("{}")
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    (folder / "vocab.txt").symlink_to(secret)
    (folder / "merges.txt").symlink_to("/absent")
    (folder / "added_tokens.json").mkdir()
    os.mkfifo(folder / "vocab.json")
    for name in ("modeling.py", "pytorch_model.bin", "optimizer.pt", "x.pkl"):
        (folder / name).write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    (folder / "notes.md").write_text("private")
    writer = export_llama(folder, tmp_path / "out")
    copied = {f.name for f in (tmp_path / "out").iterdir() if not f.name.endswith("safetensors")}
    assert copied == {*allowed, "config.json", "EXPORT.json", "model.safetensors.index.json"}
    assert not any(path.name == "pwned" for path in (tmp_path / "out").parent.rglob("*"))
    notes = "\n".join(writer.notes)
    for name in ("vocab.txt", "merges.txt", "added_tokens.json", "vocab.json", "modeling.py"):
        assert name in notes


def test_a_source_without_weights_gives_its_tokenizer(tmp_path: Path) -> None:
    """A random initialisation starts from a configuration and a tokenizer alone."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_config("llama")))
    (folder / "tokenizer.json").write_text("{}")
    build, spec = tiny_model("llama")
    export_all(FolderWriter(tmp_path / "out", spec, build, folder), RandomSource(build, spec, seed=1), spec)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    load_model(tmp_path / "out")


def test_tokenizer_of_a_hugging_face_cache_is_copied(write_folder: Write, tmp_path: Path) -> None:
    plain = llama_folder(write_folder)
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (plain / "tokenizer.json").write_text('{"a": 1}')
    for file in list(plain.iterdir()):
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
        file.rename(blobs / file.name)
    (blobs / "a0").write_text("{{ tools }}")
    (snapshot / TEMPLATES).mkdir()
    (snapshot / TEMPLATES / "tool_use.jinja").symlink_to("../../../blobs/a0")
    refuse_uncopied(snapshot)
    export_llama(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / TEMPLATES / "tool_use.jinja").read_text() == "{{ tools }}"
    copy = tmp_path / "out" / "tokenizer.json"
    assert copy.read_text() == '{"a": 1}'
    assert not copy.is_symlink()


TEMPLATES = Path("additional_chat_templates")


def test_named_chat_templates_are_carried_and_replaced_with_the_rest(
    write_folder: Write, tmp_path: Path
) -> None:
    folder = llama_folder(write_folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FIXTURES / "tiny-llama-260k" / name, folder / name)
    (folder / TEMPLATES).mkdir()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / TEMPLATES / "tool_use.jinja").write_text("{{ tools }}")
    (folder / TEMPLATES / "evil.py").write_text("")
    (folder / TEMPLATES / "away.jinja").symlink_to(tmp_path / "secret")
    out = tmp_path / "out"
    for _ in range(2):  # ours may be replaced
        writer = export_llama(folder, out)
    assert sorted(path.name for path in (out / TEMPLATES).iterdir()) == ["tool_use.jinja"]
    assert any("away.jinja was not copied" in note for note in writer.notes)
    assert (out / TEMPLATES).stat().st_mode & 0o777 == 0o700
    read = AutoTokenizer.from_pretrained(out).chat_template
    assert read == {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    (out / TEMPLATES / "mine.jinja").write_text("mine")
    with pytest.raises(UserError, match="holds files that mlx_empire did not write"):
        export_llama(folder, out)


def test_a_tokenizer_that_would_be_missing_from_the_result_is_refused_before_training(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    (folder / TEMPLATES).mkdir(parents=True)
    elsewhere.mkdir()
    for name in ("tokenizer.json", "LICENSE"):
        (elsewhere / name).write_text("{}")
    (folder / "LICENSE").symlink_to(elsewhere / "LICENSE")  # a model opens without it
    refuse_uncopied(folder)
    (folder / "tokenizer.json").symlink_to(elsewhere / "tokenizer.json")
    with pytest.raises(
        UserError, match=r"model/tokenizer\.json: not a plain file .* put a copy of it there$"
    ):
        refuse_uncopied(folder)
    (folder / "tokenizer.json").unlink()
    (folder / TEMPLATES / "rag.jinja").symlink_to(elsewhere / "tokenizer.json")
    with pytest.raises(UserError, match=r"additional_chat_templates/rag\.jinja: not a plain file"):
        refuse_uncopied(folder)
    shutil.rmtree(folder / TEMPLATES)
    (folder / TEMPLATES).symlink_to(elsewhere)
    with pytest.raises(UserError, match=r"additional_chat_templates: a link"):
        refuse_uncopied(folder)
