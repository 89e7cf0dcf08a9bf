import errno
import json
import math
import os
import stat

import mlx.core as mx
import numpy as np
import pytest

from mlx_empire.report.metrics import EVALUATION_FIELDS, STEP_FIELDS, MetricsWriter, read_metrics


def step_record(step: int, **changes: object) -> dict[str, object]:
    record: dict[str, object] = dict.fromkeys(STEP_FIELDS, 1.0)
    record |= {"step": step, "peak_bytes": [10, 20], "bytes_sent": [1, 2]}
    return record | changes


def strict_lines(folder):
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


DESIGN = """step, loss, learning_rate, grad_norm, tokens, tokens_per_second, positions, positions_per_second,
step_seconds, comm_wait_seconds, peak_bytes, predicted_peak_bytes, bytes_sent, bytes_received"""


def test_the_fields_are_those_of_the_design():
    assert list(STEP_FIELDS) == DESIGN.replace("\n", " ").split(", ")
    assert set(EVALUATION_FIELDS) == {"step", "eval_loss"}


def test_each_record_is_in_the_file_when_write_returns(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2):
            writer.write(step_record(step, loss=1 / step))
            assert strict_lines(tmp_path)[-1] == step_record(step, loss=1 / step)
        writer.write({"step": 2, "eval_loss": 3.5})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 2]
    assert "loss" not in read_metrics(tmp_path)[-1]


def test_values_that_json_cannot_say_become_null_and_arrays_become_lists(tmp_path):
    record = step_record(
        1,
        loss=math.nan,
        grad_norm=np.float32("inf"),
        tokens=np.int64(7),
        peak_bytes=np.array([3, 4]),
        bytes_sent=(5, -math.inf),
        extra={"ready": True, "norm": mx.array([0.5, math.nan])},
    )
    with MetricsWriter(tmp_path) as writer:
        writer.write(record)
    (read,) = strict_lines(tmp_path)
    assert read["loss"] is None
    assert read["grad_norm"] is None
    assert read["tokens"] == 7
    assert read["peak_bytes"] == [3, 4]
    assert read["bytes_sent"] == [5, None]
    assert read["extra"] == {"ready": True, "norm": [0.5, None]}


@pytest.mark.parametrize("name", STEP_FIELDS)
def test_a_step_without_a_required_field_is_a_programmers_error(tmp_path, name):
    record = step_record(1)
    del record[name]
    with MetricsWriter(tmp_path) as writer, pytest.raises(AssertionError, match=name):
        writer.write(record)
    assert read_metrics(tmp_path) == []


def test_the_file_is_private_whatever_the_umask(tmp_path):
    (tmp_path / "metrics.jsonl").touch(mode=0o644)
    MetricsWriter(tmp_path).close()
    assert stat.S_IMODE((tmp_path / "metrics.jsonl").stat().st_mode) == 0o600


def test_a_line_cut_short_by_a_crash_is_dropped_and_the_rest_stays(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(step_record(1))
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 2, "lo')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    with MetricsWriter(tmp_path) as writer:
        writer.write(step_record(2))
    assert [record["step"] for record in strict_lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    "damage", [b"\0" * 300, b'\0\0\0s": 1.0}', b"[" * 99_999, b"\xff\xfe", b"[1]", b"{}", b'{"step": "2"}']
)
@pytest.mark.parametrize("after_step", [None, 3])
def test_a_damaged_line_is_dropped_and_the_rest_stays(tmp_path, damage, after_step):
    with MetricsWriter(tmp_path) as writer:
        writer.write(step_record(1))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(damage + b"\n" + json.dumps(step_record(3)).encode() + b"\n" + damage)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 3]
    with MetricsWriter(tmp_path, after_step) as writer:
        writer.write(step_record(4))
    assert [record["step"] for record in strict_lines(tmp_path)] == [1, 3, 4]


def test_a_resumed_run_drops_the_steps_that_it_repeats(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3, 4):
            writer.write(step_record(step))
        writer.write({"step": 4, "eval_loss": 1.0})
    with MetricsWriter(tmp_path, after_step=2) as writer:
        writer.write(step_record(3, loss=9.0))
    assert [(record["step"], record["loss"]) for record in strict_lines(tmp_path)] == [
        (1, 1.0),
        (2, 1.0),
        (3, 9.0),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_on_a_full_disk_records_wait_and_none_is_lost_or_torn(tmp_path):
    class FullDisk:
        """Takes so many bytes, then none until there is room."""

        def __init__(self, file, room):
            self.file, self.room = file, room

        def write(self, data):
            taken = data[: self.room]
            if not taken:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.room -= len(taken)
            return self.file.write(taken)

        def __getattr__(self, name):
            return getattr(self.file, name)

    with MetricsWriter(tmp_path) as writer:
        writer.write(step_record(1))
        size = writer.path.stat().st_size
        disk = writer._file = FullDisk(writer._file, size // 2)
        for step in (2, 3):
            writer.write(step_record(step))
            assert writer.waiting
        disk.room = size
        writer.write(step_record(4))
        assert writer.waiting
        disk.room = 10 * size
        writer.write(step_record(5))
        assert not writer.waiting
    assert strict_lines(tmp_path) == [step_record(step) for step in range(1, 6)]
