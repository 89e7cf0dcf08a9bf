"""A manifest comes back as it was written, and nothing else is taken for one."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.manifests import manifest_of

from mlx_empire.checkpoint.manifest import Manifest, Piece, Shard, decode_manifest

DIGEST = "0123456789abcdef" * 4


def shard(rank: int, size: int) -> Shard:
    piece = Piece(
        tensor="model.embed.weight", array="m", code="F32", first_row=3, rows=5, columns=64, digest=DIGEST
    )
    return Shard(
        file=f"shard-{rank:05d}-of-{size:05d}.safetensors",
        rank=rank,
        host="king",
        folder="/data",
        header_bytes=128,
        header_digest=DIGEST,
        pieces=(piece,),
    )


def manifest() -> Manifest:
    return manifest_of(
        "run: {}\n",
        written_by={"mlx": "1"},
        next_row=42,
        numerics={"losses": (0.1, 1e-300, 3.0000000000000004)},
        shares=(2 / 3, 1 / 3),
        shards=(shard(0, 2), shard(1, 2)),
    )


def test_what_was_written_is_read() -> None:
    again = decode_manifest(manifest().encode())
    assert again == manifest()
    assert again.encode() == manifest().encode()
    assert again.shards[0].nbytes == 128 + 5 * 64 * 4


def edited(change: Any) -> bytes:
    record = json.loads(manifest().encode())
    change(record)
    return json.dumps(record).encode()


BAD: dict[str, tuple[Any, str]] = {
    "a path out of the folder": (lambda r: r["shards"][0].update(file="../../etc/passwd"), "shards.0.file"),
    "another rank's file": (
        lambda r: r["shards"][0].update(file="shard-00001-of-00002.safetensors"),
        "shards.0: named shard-00001",
    ),
    "a shard too few": (lambda r: r["shards"].pop(), "of-00001"),
    "unknown key": (lambda r: r.update(more=1), "more"),
    "missing key": (lambda r: r.pop("seed"), "seed"),
    "a negative row": (lambda r: r["shards"][0]["pieces"][0].update(first_row=-1), "first_row"),
    "an unknown dtype": (lambda r: r["shards"][0]["pieces"][0].update(code="F8"), "code"),
    "a number as text": (lambda r: r.update(step="7"), "step"),
    "another recipe": (lambda r: r.update(recipe="run: {x: 1}\n"), "recipe: it does not match"),
    "another format": (lambda r: r.update(format=2), "format"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named(case: str) -> None:
    change, said = BAD[case]
    with pytest.raises(ValueError, match=said):
        decode_manifest(edited(change))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_no_manifest(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_manifest(raw)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_manifest_with_any_change_is_refused_or_is_one(data: st.DataObject) -> None:
    raw = bytearray(manifest().encode())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ValueError):
        assert isinstance(decode_manifest(bytes(raw)), Manifest)


def test_depth_does_not_end_the_program() -> None:
    with pytest.raises(ValueError, match="recursion"):
        decode_manifest(b"[" * 100_000)
