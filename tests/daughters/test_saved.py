"""The file of a daughter who goes on: what is read is what was in memory, and what was changed is found."""

import errno
import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from engine.test_multi_adapter import COMMON, cohort_of, given
from support.tuning import TunedCase

from mlx_empire.checkpoint.manifest import Origin
from mlx_empire.checkpoint.shard import live_pieces
from mlx_empire.comm.thread import CommThread
from mlx_empire.daughters.saved import (
    FILE_NAME,
    ResumePoint,
    put_in_place,
    read_arrays,
    restore,
    resume_point_of,
    write_draft,
)
from mlx_empire.errors import UnreadableError, UserError
from mlx_empire.formats import safetensors
from mlx_empire.model.spec import own_name

CASES = {
    bits: TunedCase("llama", state_bits=bits, tuning={"type": "lora", "rank": 16}, **COMMON)
    for bits in (8, 32)
}
RELEASED = TunedCase("llama", release=True, tuning={"type": "lora", "rank": 16}, **COMMON)
BOOKMARK = ResumePoint(2, 1, "here", Origin("run: {}", "rows", "base"))


def save(adapters, place, folder):
    pieces = live_pieces(adapters.store, 0)
    point = replace(BOOKMARK, last_norm=adapters.last_norm(place))
    write_draft(folder, point, [p for p in pieces if own_name(p.tensor)[0] == place])
    return point


@pytest.mark.parametrize("case", [*CASES.values(), RELEASED], ids=[*CASES, "released"])
def test_what_is_restored_goes_on_as_before(case, tmp_path):
    """In another place, beside another, and with exactly the same values after two more steps."""
    with CommThread() as thread:
        adapters = cohort_of(case, 2, thread)
        adapters.begin(1)
        for step in range(2):
            adapters.step({1: given(case, 1, step)})
        point = save(adapters, 1, tmp_path)
        assert point.last_norm > 0
        assert resume_point_of(tmp_path) is None
        put_in_place(tmp_path)
        assert resume_point_of(tmp_path) == point
        for step in (2, 3):
            adapters.step({1: given(case, 1, step)})
        expected = adapters.adapter(1)

        other = cohort_of(case, 2, thread)
        other.begin(0)
        other.begin(1)
        other.step({1: given(case, 3, 0)})
        arrays = read_arrays(tmp_path)
        assert any(a.dtype == mx.float32 for a in arrays.values())
        restore(arrays, other.store, 0, tmp_path)
        other.carry_on(0, point.last_norm)
        for step in (2, 3):
            other.step({0: given(case, 1, step)})
        found = other.adapter(0)
        assert found.keys() == expected.keys()
        assert all(mx.array_equal(found[name], expected[name]) for name in expected)


def test_what_does_not_fit_changes_nothing(tmp_path):
    with CommThread() as thread:
        adapters, wide = (cohort_of(CASES[32], 1, thread) for _ in range(2))
        adapters.begin(0)
        adapters.step({0: given(CASES[32], 1, 0)})
        save(adapters, 0, tmp_path)
        put_in_place(tmp_path)
        arrays = read_arrays(tmp_path)
        wide.begin(0)
        before = wide.adapter(0)
        name = sorted(arrays)[-1]
        for wrong in (
            {},
            {**arrays, name: arrays[name][:-1]},
            {**arrays, name: arrays[name].astype(mx.bfloat16)},
        ):
            with pytest.raises(UserError, match="is not of this adapter and optimizer"):
                restore(wrong, wide.store, 0, tmp_path)
        assert all(np.array_equal(a, before[n]) for n, a in wide.adapter(0).items())


def test_damage_is_found(tmp_path):
    with CommThread() as thread:
        adapters = cohort_of(CASES[32], 1, thread)
        adapters.begin(0)
        save(adapters, 0, tmp_path)
        put_in_place(tmp_path)
    path = tmp_path / FILE_NAME
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for at in (start, (start + len(whole)) // 2, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert resume_point_of(tmp_path) == BOOKMARK
        with pytest.raises(UserError, match="damaged"):
            read_arrays(tmp_path)
    path.write_bytes(whole[:-8])
    with pytest.raises(UserError, match="damaged"):
        resume_point_of(tmp_path)


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"format": "pt"},
        {"format": "mlx_empire unfinished 1"},
        {"format": "mlx_empire unfinished 1", "bookmark": "[]"},
        {
            "format": "mlx_empire unfinished 1",
            "bookmark": '{"step": 1, "place": 0, "machine": "a", "origin": 3}',
        },
        {"format": "mlx_empire unfinished 1", "bookmark": "[" * 100_000},
    ],
)
def test_another_file_of_that_name_is_refused_in_one_line(about, tmp_path):
    raw = json.dumps({"__metadata__": about}).encode()
    (tmp_path / FILE_NAME).write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(UserError, match="not a daughter's file") as error:
        resume_point_of(tmp_path)
    assert "\n" not in str(error.value)


def test_what_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    raw = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    (tmp_path / FILE_NAME).write_bytes(len(raw).to_bytes(8, "little") + raw)

    def refused(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(safetensors, "open_plain", refused)
    with pytest.raises(UnreadableError, match="Input/output error"):
        resume_point_of(tmp_path)
