"""Frozen folders: whatever is changed in one is found and named."""

import json
import stat

import pytest

from mlx_empire.errors import UserError
from mlx_empire.formats.seal import check_sealed, seal_folder, sealed_digest, unseal


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "final"
    (made / "peft").mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(bytes(range(200)))
    (made / "peft/adapter_config.json").write_text("{}")
    return made


def unlocked(folder):
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)


def test_it_is_read_only_and_verifies(folder):
    digest = seal_folder(folder, {"gate": "reached"})
    for path in (folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o500 if path.is_dir() else 0o400), path
    assert sealed_digest(folder) == digest
    assert digest.startswith("sha256:")
    assert json.loads((folder / "FROZEN.json").read_text())["gate"] == "reached"
    check_sealed(folder, digest)


def test_the_digest_is_of_the_files_alone(folder, tmp_path):
    import shutil

    other = shutil.copytree(folder, tmp_path / "other")
    assert seal_folder(folder, {"a": 1}) == seal_folder(other, {"b": 2})
    unlocked(other)
    (other / "config.json").write_text("{ }")
    (other / "FROZEN.json").unlink()
    assert seal_folder(other, {}) != sealed_digest(folder)


def test_freezing_is_taken_back(folder):
    """Whole, and where a kill left it half done: the manifest cut short, some files read-only."""
    before = {path: path.stat().st_mode for path in (folder, *folder.rglob("*"))}
    unseal(folder)
    assert {path: path.stat().st_mode for path in (folder, *folder.rglob("*"))} == before
    for half in (False, True):
        digest = seal_folder(folder, {})
        if half:
            folder.chmod(0o700)
            (folder / "FROZEN.json").chmod(0o600)
            (folder / "FROZEN.json").write_text('{"digest": ')
        unseal(folder)
        for path in (folder, *folder.rglob("*")):
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
        assert {path for path in (folder, *folder.rglob("*"))} == before.keys()
    assert seal_folder(folder, {}) == digest


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def relist(folder):
    manifest = json.loads((folder / "FROZEN.json").read_text())
    manifest["files"]["config.json"]["bytes"] = 3
    (folder / "FROZEN.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: flip(f / "model.safetensors"), "model.safetensors: changed since the base was frozen"),
        (lambda f: flip(f / "peft/adapter_config.json"), "peft/adapter_config.json: changed since"),
        (lambda f: (f / "config.json").unlink(), "config.json: this file of the frozen base is missing"),
        (lambda f: (f / "more.py").touch(), "more.py: this file is no part of the frozen base"),
        (relist, "FROZEN.json: it was changed"),
        (lambda f: (f / "FROZEN.json").unlink(), "is not frozen"),
        (lambda f: (f / "FROZEN.json").write_text("[]"), "FROZEN.json: damaged"),
    ],
)
def test_what_changed_is_named(change, message, folder):
    digest = seal_folder(folder, {})
    unlocked(folder)
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        check_sealed(folder, digest)
    assert "\n" not in str(error.value)


def test_another_base_is_refused(folder):
    seal_folder(folder, {})
    with pytest.raises(UserError, match="this is another base"):
        check_sealed(folder, "sha256:" + "0" * 64)
