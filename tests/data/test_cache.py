"""The tokenised cache: believed when whole, built again when anything changed or is damaged."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mlx_empire import disk
from mlx_empire.data import cache, splits, stream
from mlx_empire.data.splits import load_splits
from mlx_empire.errors import DoesNotFitError, UserError

ROWS = [{"tokens": list(range(n, n + 9))} for n in range(20)]


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "tokens").iterdir())


@pytest.fixture
def builds(monkeypatch):
    """Counts how often the data was read and tokenised."""
    count = [0]
    build = splits._build

    def counting(*args):
        count[0] += 1
        return build(*args)

    monkeypatch.setattr(splits, "_build", counting)
    return count


def same(first, second) -> bool:
    pairs = zip(first.train.table.arrays().values(), second.train.table.arrays().values(), strict=True)
    return first.digest == second.digest and all(np.array_equal(a, b) for a, b in pairs)


def test_the_second_time_nothing_is_tokenised(write, builds, own_cache):
    path = write("a.jsonl", *ROWS)
    first = load_splits(path=path, sequence_length=4)
    second = load_splits(path=path, sequence_length=4)
    assert builds == [1]
    assert same(first, second)
    assert first.report[:-1] == second.report[:-1]
    assert "written to" in first.report[-1]
    assert "read from" in second.report[-1]
    (entry,) = entries(own_cache)
    assert {file.stat().st_mode & 0o777 for file in entry.iterdir()} == {0o600}
    assert entry.stat().st_mode & 0o777 == 0o700


def test_the_same_content_elsewhere_is_the_same_entry(write, builds):
    first = load_splits(path=write("a.jsonl", *ROWS), sequence_length=4)
    second = load_splits(path=write("far/away/b.jsonl", *ROWS), sequence_length=4)
    assert builds == [1]
    assert same(first, second)


def test_the_same_files_are_another_entry_where_one_of_them_went_from_training_to_validation(write, builds):
    for folder, trained in (("a", 2), ("b", 1)):
        for number, row in enumerate(ROWS[:3]):
            split, place = ("train", number) if number < trained else ("validation", number - trained)
            count = trained if split == "train" else 3 - trained
            path = write(f"{folder}/{split}-{place:05}-of-{count:05}.jsonl", row)
        loaded = load_splits(path=path.parent, sequence_length=8)
        assert builds == [1 if folder == "a" else 2]
        assert loaded.valid is not None
        assert (len(loaded.train), len(loaded.valid)) == (trained, 3 - trained)


def test_whatever_changes_the_rows_is_another_entry(write, builds, tmp_path, tokenizer_folder):
    path = write("a.jsonl", *[{"prompt": f"number {n}", "completion": f" is {n}"} for n in range(20)])
    folder = tmp_path / "model"
    shutil.copytree(tokenizer_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    base = {"path": path, "sequence_length": 40, "tokenizer_folder": folder}
    changes = [
        {},
        {"sequence_length": 39},
        {"packing": True},
        {"mask_prompt": False},
        {"validation_split": 0.2},
        {"vocab_size": 512},
    ]
    for change in changes:
        load_splits(**base | change)
    assert builds == [len(changes)]

    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ messages[0].content }}{{ messages[1].content }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    load_splits(**base)
    assert builds == [len(changes) + 1]

    path.write_text(path.read_text().replace("number 3", "number three"))
    load_splits(**base)
    assert builds == [len(changes) + 2]
    load_splits(**base)
    assert builds == [len(changes) + 2]

    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')  # other tokens end a turn
    load_splits(**base)
    assert builds == [len(changes) + 3]


@pytest.mark.parametrize("name", ["train.tokens.npy", "train.counted.npy", "train.pieces.npy", "index.json"])
@pytest.mark.parametrize("how", ["flip", "truncate", "remove", "garbage"])
def test_a_damaged_entry_is_built_again(name, how, write, builds, own_cache):
    path = write("a.jsonl", *ROWS)
    first = load_splits(path=path, sequence_length=4)
    expected = first.digest
    (entry,) = entries(own_cache)
    file = entry / name
    content = bytearray(file.read_bytes())
    if how == "remove":
        file.unlink()
    else:
        if how == "flip":
            content[-20] ^= 1
        elif how == "truncate":
            del content[-20:]
        else:
            content = bytearray(b"\x80\x04garbage")
        file.write_bytes(content)
    del first
    again = load_splits(path=path, sequence_length=4)
    assert builds == [2]
    assert again.digest == expected
    assert again.train.row(0).inputs.tolist() == [0, 1, 2, 3]
    load_splits(path=path, sequence_length=4)
    assert builds == [2], "the entry was repaired"


def test_a_cache_that_cannot_be_written_is_only_a_remark(write, monkeypatch, tmp_path):
    blocked = tmp_path / "a_file"
    blocked.write_text("")
    monkeypatch.setenv("MLX_EMPIRE_CACHE", str(blocked))
    loaded = load_splits(path=write("a.jsonl", *ROWS), sequence_length=4)
    assert len(loaded.train) == 40
    assert "not cached" in loaded.report[-1]
    assert "MLX_EMPIRE_CACHE" in loaded.report[-1]


def test_ranks_that_build_at_once_agree_and_leave_one_entry(write, builds, own_cache, monkeypatch):
    waited = []
    monkeypatch.setattr(splits.progress, "advance", lambda: waited.append(threading.get_ident()))
    path = write("a.jsonl", *ROWS)
    loaded = []
    build = splits._build

    def slowly(*args):
        time.sleep(0.5)
        return build(*args)

    monkeypatch.setattr(splits, "_build", slowly)
    ranks = [
        threading.Thread(target=lambda: loaded.append(load_splits(path=path, sequence_length=4)))
        for _ in range(4)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(loaded) == 4
    assert builds == [1], "one does it"
    assert set(waited) >= {rank.ident for rank in ranks}, "the others say that they live"
    assert all(same(loaded[0], other) for other in loaded)
    assert len(entries(own_cache)) == 1


HOLDS = """\
import sys, time
from pathlib import Path
from mlx_empire.disk import building
with building(Path(sys.argv[1])) as place:
    (place / "half").write_text("")
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_whose_holder_is_killed_is_free_and_what_it_left_is_gone(tmp_path):
    folder = tmp_path / "tokens" / "entry"
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    waits = []

    def wait():
        waits.append(0)
        if len(waits) == 2:
            holder.kill()

    with disk.building(folder, wait) as place:
        holder.wait()
        assert len(waits) >= 2
        assert list(place.iterdir()) == []
    assert list(folder.parent.iterdir()) == []


def test_what_kills_left_of_other_entries_is_removed(tmp_path):
    for name in ("a.lock", "a.d", "b.lock"):
        path = tmp_path / f".building-{name}"
        path.mkdir() if name.endswith(".d") else path.write_text("")
    with disk.building(tmp_path / "entry"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            ".building-entry.d",
            ".building-entry.lock",
        ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["content", "time"])
def test_data_that_changes_while_it_is_read_is_no_entry(what, write, own_cache, monkeypatch):
    path = write("a.jsonl", *ROWS)
    build = splits._build

    def changes(*args):
        made = build(*args)
        with path.open("a") as file:
            file.write('{"tokens": [1, 2]}\n')
        if what == "time":
            path.write_text(path.read_text().removesuffix('{"tokens": [1, 2]}\n'))
        return made

    monkeypatch.setattr(splits, "_build", changes)
    with pytest.raises(UserError, match=r"a\.jsonl: changed while it was read"):
        load_splits(path=path, sequence_length=4)
    assert entries(own_cache) == []
    monkeypatch.setattr(splits, "_build", build)
    assert len(load_splits(path=path, sequence_length=4).train) == (41 if what == "content" else 40)


def test_an_entry_is_on_the_disk_before_it_has_its_name(write, own_cache, monkeypatch):
    steps = []
    rename = Path.rename
    monkeypatch.setattr(cache, "sync_file", lambda file: steps.append(os.fstat(file.fileno()).st_ino))
    for module in (cache, disk):
        monkeypatch.setattr(module, "sync_folder", lambda folder: steps.append("folder"))
    monkeypatch.setattr(Path, "rename", lambda self, to: (steps.append("rename"), rename(self, to))[1])
    load_splits(path=write("a.jsonl", *ROWS), sequence_length=4)
    named = steps[-3:]
    assert named == ["folder", "rename", "folder"]
    (entry,) = entries(own_cache)
    assert set(steps[:-3]) - {"rename"} == {file.stat().st_ino for file in entry.iterdir()}


@pytest.mark.parametrize("where", ["in the middle", "before the copy"])
def test_more_data_than_memory_holds_is_refused_where_the_disk_is_full(where, write, own_cache, monkeypatch):
    path = write("a.jsonl", *ROWS)
    packing = where == "before the copy"
    if packing:
        monkeypatch.setattr(stream, "free_bytes", lambda _: 5 * 20 * 9 - 1)
        monkeypatch.setattr(stream.Pieces, "_copied", lambda *_: pytest.fail("no room for a copy"))
    else:

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(stream.Flat, "append", full)
    monkeypatch.setattr(splits, "MOST_IN_MEMORY", path.stat().st_size - 1)
    with pytest.raises(
        DoesNotFitError, match=r"No space left on device: the tokens of .* MLX_EMPIRE_CACHE"
    ) as told:
        load_splits(path=path, sequence_length=16, packing=packing)
    assert "\n" not in str(told.value)
    assert list((own_cache / "tokens").iterdir()) == []
