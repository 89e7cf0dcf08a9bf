"""Any bytes where a file of ours is expected: a valid object or the project's own error, within two seconds.

Three kinds of bytes: none that make sense, words and signs of the format in any order, and a good file with a few
changes, which is what gets deepest. `make test-fuzz` tries 2,000 of each, `make test` a few.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.manifests import manifest_of
from train.launching import RECIPE

from mlx_empire.checkpoint.manifest import Piece, Resolved, Shard, decode_manifest, digest_of
from mlx_empire.checkpoint.paths import shard_name
from mlx_empire.cluster.hostfile import load_hostfile
from mlx_empire.data.encode import encode_rows
from mlx_empire.data.files import Source
from mlx_empire.data.row_format import KEYS, check_row, detect_format
from mlx_empire.errors import UserError
from mlx_empire.formats.hf_folder import INDEX_NAME, open_folder
from mlx_empire.formats.safetensors import read_header
from mlx_empire.launch.ending import Events, Listener
from mlx_empire.model.config import read_config
from mlx_empire.recipe.load import load_recipe
from mlx_empire.run.lock import Holder, read_holder

EXAMPLES = int(os.environ.get("MLX_EMPIRE_FUZZ_EXAMPLES", "40"))
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=timedelta(seconds=2),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

HOSTS = b"""\
# my machines
king.local       slots=1  # role=king    memory=512GiB
soldier-1.local  slots=2 max_slots=4 # role=soldier memory=256GiB limit=208GiB link=1.1GB/s chip=M3-Ultra
"""
ROWS = b"".join(
    json.dumps(row, ensure_ascii=False).encode() + b"\n"
    for row in (
        {"tokens": [1, 2, 3, 4]},
        {"text": "a line, \u00e4\u00f6\u00fc \U0001f34e"},
        {"prompt": "one", "completion": "two"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    )
)
HEADER = json.dumps(
    {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
).encode()
INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}).encode()
CONFIG = b'{"model_type": "llama", "hidden_size": 64, "tie_word_embeddings": false, "rope_scaling": null}'
LOCK = b'{"host": "king", "pid": 4711, "since": "2026-01-02T03:04:05+00:00"}'
SAID = b"""\
mlx_empire: rank 1 on king: stuck
@mlx_empire {"event": "place", "rank": 1, "host": "king", "thread": "MainThread", "phase": "forward", "step": 3}
@mlx_empire {"event": "failure", "rank": 1, "host": "king", "code": 75, "message": "gone"}
--------------------------------------------------------------------------
prterun noticed that process rank 1 with PID 4711 on node king exited on signal 9 (Killed).
--------------------------------------------------------------------------
"""


@cache
def manifest() -> bytes:
    digest = digest_of(b"")
    pieces = tuple(
        Piece(tensor="a.weight", array=array, code="F32", first_row=0, rows=2, columns=64, digest=digest)
        for array in ("weights", "m", "v")
    )
    shards = tuple(
        Shard(
            file=shard_name(rank, 2), rank=rank, host="king", folder="/checkpoints", header_bytes=80,
            header_digest=digest, pieces=pieces,
        )
        for rank in range(2)
    )  # fmt: skip
    return manifest_of(
        RECIPE, step=3, written_by={"mlx": "0"}, data_digest=digest, next_row=18,
        resolved=Resolved(cells=4, gradient_dtype="float32"), numerics={"losses": (1.5, 2.5)}, zero_stage=2,
        shares=(0.5, 0.5), shards=shards,
    ).encode()  # fmt: skip


EVIL = [
    *(
        b"\x00",
        b"\xff",
        b"\xfe\xff",
        b"\xef\xbb\xbf",
        b"\r\n",
        b"\n",
        b"\t",
        b" ",
        b"\\",
        b"\\ud800",
        b"\xc3\x28",
    ),
    *(
        b"[" * 300,
        b"{" * 300,
        b'{"a":' * 300,
        b"9" * 400,
        b"1e999",
        b"-0",
        b"NaN",
        b"Infinity",
        b"null",
        b"true",
    ),
    *(
        b"&a",
        b"*a",
        b"<<: *a",
        b"!!python/object/apply:os.system [ls]",
        b"---",
        b"...",
        b"%YAML 9.9",
        b"? ",
        b"- ",
    ),
    *(
        b"../",
        b"/etc/passwd",
        b"\xe2\x80\xae",
        b"{}",
        b"[]",
        b'""',
        b"''",
        b":",
        b",",
        b"=",
        b"#",
        b"-oProxyCommand=x",
    ),
]


def changed(good: bytes) -> st.SearchStrategy[bytes]:
    """The good file with a few pieces cut out, repeated or replaced."""
    number = st.integers(-(2**70), 2**70).map(lambda value: str(value).encode())
    piece = st.one_of(st.sampled_from(EVIL), st.binary(max_size=6), number)
    edit = st.tuples(st.integers(0, len(good)), st.integers(0, 24), piece, st.integers(0, 3))

    def apply(edits: list[tuple[int, int, bytes, int]]) -> bytes:
        raw = good
        for place, length, new, times in edits:
            raw = raw[:place] + new * times + raw[place + length :]
        return raw

    return st.lists(edit, min_size=1, max_size=5).map(apply)


def shuffled(good: bytes) -> st.SearchStrategy[bytes]:
    """Words and signs of the format, in any order."""
    words = sorted({word for line in good.split() for word in (line, line[: len(line) // 2])} - {b""})
    return st.lists(st.sampled_from([*words[:60], *EVIL, b" ", b"\n"]), max_size=30).map(b"".join)


def bytes_like(good: bytes) -> st.SearchStrategy[bytes]:
    return st.one_of(changed(good), changed(good), shuffled(good), st.binary(max_size=200))


def one_line(error: Exception) -> None:
    """Our own errors are of one printable line, not the repetition of the input."""
    text = str(error)
    assert text
    assert len(text) < 1500
    assert "\n" not in text
    assert text.isprintable(), ascii(text)


def survives(read: Callable[[], Any], allowed: type[Exception] = UserError) -> Any:
    """What `read` returns; None for the error that is allowed. Anything else is the test's failure."""
    try:
        return read()
    except allowed as error:
        one_line(error)
        return None


@FUZZ
@given(raw=bytes_like(RECIPE.encode()))
def test_recipe(raw: bytes, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(raw)
    survives(lambda: load_recipe(file))


@FUZZ
@given(override=bytes_like(b"memory.shares=[2, 1]").map(lambda raw: raw.decode(errors="surrogateescape")))
def test_override(override: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    survives(lambda: load_recipe(file, [override]))


@FUZZ
@given(raw=bytes_like(HOSTS))
def test_hostfile(raw: bytes, tmp_path: Path) -> None:
    file = tmp_path / "hosts.txt"
    file.write_bytes(raw)
    cluster = survives(lambda: load_hostfile(file))
    assert cluster is None or all(not host.name.startswith("-") for host in cluster.nodes)


@FUZZ
@given(raw=bytes_like(manifest()))
def test_manifest(raw: bytes) -> None:
    found = survives(lambda: decode_manifest(raw), ValueError)
    if found is not None:
        assert all("/" not in shard.file and ".." not in shard.file for shard in found.shards)
        assert decode_manifest(found.encode()) == found


@FUZZ
@given(
    raw=bytes_like(HEADER), length=st.one_of(st.none(), st.integers(0, 2**64 - 1)), data=st.integers(0, 40)
)
def test_safetensors_header(raw: bytes, length: int | None, data: int, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    announced = len(raw) if length is None else length
    file.write_bytes(announced.to_bytes(8, "little") + raw + bytes(data))
    header = survives(lambda: read_header(file))
    if header is not None:
        assert sum(t.stop - t.start for t in header.tensors) == file.stat().st_size - 8 - announced


@FUZZ
@given(raw=bytes_like(INDEX))
def test_index(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_bytes(raw)
    (tmp_path / "model-1.safetensors").write_bytes(len(HEADER).to_bytes(8, "little") + HEADER + bytes(32))
    folder = survives(lambda: open_folder(tmp_path))
    assert folder is None or set(folder.files) == {"model-1.safetensors"}


@FUZZ
@given(raw=bytes_like(CONFIG))
def test_config(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(raw)
    survives(lambda: read_config(tmp_path))


@FUZZ
@given(raw=bytes_like(ROWS), kind=st.sampled_from([*KEYS, "auto"]))
def test_json_lines(raw: bytes, kind: str, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(raw)

    def read() -> None:
        rows = list(Source(".jsonl", file, (file,)).rows())
        name = detect_format(rows[0]) if kind == "auto" and rows else kind
        for row in rows:
            check_row(row, name)
        if name == "tokens":
            documents = list(encode_rows(iter(rows), name, None, True, 300))
            assert all(0 <= token < 300 for document in documents for token in document.tokens)

    survives(read)


@FUZZ
@given(raw=bytes_like(LOCK))
def test_lock(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "LOCK").write_bytes(raw)
    holder = read_holder(tmp_path)
    assert holder is None or isinstance(holder, Holder)


@FUZZ
@given(raw=bytes_like(SAID), cuts=st.lists(st.integers(1, 80), max_size=8))
def test_what_ranks_say(raw: bytes, cuts: list[int]) -> None:
    """The launcher reads stderr, on which anybody may write, in pieces of any size."""
    account = Events()
    listener = Listener(account)
    shown, rest = "", raw
    for cut in cuts:
        shown += listener.feed(rest[:cut])
        rest = rest[cut:]
    shown += listener.feed(rest) + listener.close()
    assert isinstance(shown, str)


@pytest.mark.parametrize("bracket", [b"[", b'{"a":', b"- ", b"{a: "])
def test_deep_nesting(bracket: bytes, tmp_path: Path) -> None:
    """Deeper than Python's parsers can follow."""
    deep = bracket * 12_000
    for name in ("recipe.yaml", "hosts.txt", "train.jsonl", "config.json", INDEX_NAME, "LOCK"):
        (tmp_path / name).write_bytes(deep)
    (tmp_path / "x.safetensors").write_bytes(len(deep).to_bytes(8, "little") + deep)
    rows = Source(".jsonl", tmp_path, (tmp_path / "train.jsonl",))
    for read in (
        lambda: load_recipe(tmp_path / "recipe.yaml"),
        lambda: load_hostfile(tmp_path / "hosts.txt"),
        lambda: list(rows.rows()),
        lambda: read_config(tmp_path),
        lambda: open_folder(tmp_path),
        lambda: read_header(tmp_path / "x.safetensors"),
        lambda: read_holder(tmp_path),
    ):
        assert survives(read) is None
    assert survives(lambda: decode_manifest(deep), ValueError) is None
    assert Listener(Events()).feed(b"@mlx_empire " + deep + b"\n") == ""


@pytest.mark.parametrize(
    ("good", "read"),
    [
        (RECIPE.encode(), lambda file: load_recipe(file)),
        (HOSTS, lambda file: load_hostfile(file)),
        (manifest(), lambda file: decode_manifest(file.read_bytes())),
        (LOCK, lambda file: read_holder(file.parent)),
        (len(HEADER).to_bytes(8, "little") + HEADER + bytes(32), lambda file: read_header(file)),
    ],
)
def test_the_good_files_are_good(good: bytes, read: Callable[[Path], Any], tmp_path: Path) -> None:
    """Or their changes would test little."""
    file = tmp_path / "LOCK"
    file.write_bytes(good)
    assert read(file) is not None
