"""Layers' inputs in a file: the same bytes come back, nothing stays behind, and what a disk that fails means."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_empire import disk
from mlx_empire.engine.input_file import InputFile
from mlx_empire.errors import DoesNotFitError, LostRankError, NoRoomError, UserError

KILLED = """
import os, signal, sys
from pathlib import Path
import mlx.core as mx
from mlx_empire.engine.input_file import InputFile
file = InputFile(Path(sys.argv[1]), 4, 1 << 20)
file.open()
file.write(1, 0, mx.ones((1 << 18,)))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_inputs_come_back_as_they_were_in_any_order_and_free_their_places(tmp_path, dtype):
    file = InputFile(tmp_path, 6, 4 * 3 * 40 * 16)
    for step in range(3):
        arrays = {}
        for layer in (1, 2):
            for micro in range(3):
                rows = 1 + (layer + micro + step) % 3  # shorter ones leave a part of their place
                array = mx.random.normal((rows, 40, 16)).astype(dtype)
                mx.eval(array)
                arrays[layer, micro] = np.array(array.view(mx.uint8))
                file.write(layer, micro, array)
                file.written(layer, micro)
        for key in sorted(arrays, reverse=step == 1):
            file.read(*key)
            assert np.array_equal(np.array(file.fetched(*key).view(mx.uint8)), arrays[key])


def test_what_is_not_in_a_row_is_written_as_if_it_were(tmp_path):
    for dtype in (mx.float32, mx.bfloat16):
        file, turned = InputFile(tmp_path, 1, 4 * 6), mx.arange(6).astype(dtype).reshape(2, 3).T
        mx.eval(turned)
        file.write(1, 0, turned)
        file.read(1, 0)
        assert mx.array_equal(file.fetched(1, 0), turned)


def test_a_step_that_was_left_in_the_middle_is_forgotten(tmp_path):
    file = InputFile(tmp_path, 2, 64)
    for _ in range(3):
        file.begin()
        for micro in range(2):
            file.write(1, micro, mx.ones((16,)))
        file.read(1, 0)


def test_the_file_has_its_room_from_the_beginning_and_no_name(tmp_path):
    folder = tmp_path / "checkpoints"
    file = InputFile(folder, 16, 1 << 20)
    assert list(tmp_path.iterdir()) == []
    file.open()
    assert list(tmp_path.iterdir()) == []
    found = os.fstat(file._file.fileno())  # type: ignore[union-attr]
    assert (found.st_size, found.st_nlink, found.st_mode & 0o777) == (16 << 20, 0, 0o600)
    assert 512 * found.st_blocks >= 16 << 20


def test_a_kill_leaves_nothing(tmp_path):
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert ended.returncode == -9
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "begun", "meant", "words"),
    [
        (errno.ENOSPC, False, DoesNotFitError, "the disk is full, and the file takes 4.00 MiB"),
        (errno.EROFS, False, UserError, "Read-only file system"),
        (errno.ENOSPC, True, NoRoomError, "the disk is full"),
        (errno.EIO, True, LostRankError, "Input/output error"),
    ],
)
def test_a_disk_that_fails_is_told_in_a_line_with_a_remedy(
    tmp_path, monkeypatch, number, begun, meant, words
):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    folder = tmp_path / "checkpoints"
    file = InputFile(folder, 4, 1 << 20)
    if begun:
        file.open()
        monkeypatch.setattr(os, "pwrite", fails)
    else:
        monkeypatch.setattr(disk, "_take_room", fails)

    def use() -> None:
        file.write(1, 0, mx.ones((16,)))
        file.written(1, 0)

    with pytest.raises(meant) as told:
        use()
    assert type(told.value) is meant
    said = str(told.value)
    assert said.startswith(f"memory.activation_offload: {folder}: ")
    assert words in said
    assert "run.checkpoints" in said
    assert "\n" not in said
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_cut_is_no_input(tmp_path):
    file = InputFile(tmp_path, 1, 64)
    file.write(1, 0, mx.ones((16,)))
    file.written(1, 0)
    os.ftruncate(file._file.fileno(), 32)  # type: ignore[union-attr]
    file.read(1, 0)
    with pytest.raises(LostRankError, match="ends too early"):
        file.fetched(1, 0)


def test_where_the_system_takes_no_room_at_once_zeros_take_it(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr(disk, "_PIECE_BYTES", 1000)
    with disk.unnamed_private(tmp_path, 4096) as file:
        assert os.fstat(file.fileno()).st_size == 4096
        disk.write_at(file, memoryview(bytes(range(256)) * 16), 0)
        back = bytearray(4000)
        disk.read_at(file, memoryview(back), 96)
    assert bytes(back) == (bytes(range(256)) * 16)[96:]
    assert list(Path(tmp_path).iterdir()) == []
