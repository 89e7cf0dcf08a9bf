import builtins
import math
import stat
import struct

import pytest

from mlx_empire.errors import UserError
from mlx_empire.report.tensorboard import TensorBoardWriter


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """Every scalar by tag: TFRecord framing (length, crc, payload, crc) around protobuf messages."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found: dict[str, list[tuple[int, float]]] = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_steps_and_evaluations_can_be_read_back(tmp_path):
    pytest.importorskip("tensorboardX")
    with TensorBoardWriter(tmp_path) as writer:
        writer.step({"step": 1, "loss": 2.5, "grad_norm": math.nan, "peak_bytes": [1024, 2048]})
        writer.step({"step": 2, "loss": 2.25, "grad_norm": 0.5, "peak_bytes": [1024, 4096]})
        writer.evaluation({"step": 2, "eval_loss": 3.5})
    assert scalars(tmp_path / "tensorboard") == {
        "train/loss": [(1, 2.5), (2, 2.25)],
        "train/grad_norm": [(2, 0.5)],
        "rank-0/peak_bytes": [(1, 1024.0), (2, 1024.0)],
        "rank-1/peak_bytes": [(1, 2048.0), (2, 4096.0)],
        "eval/loss": [(2, 3.5)],
    }
    assert stat.S_IMODE((tmp_path / "tensorboard").stat().st_mode) == 0o700


def test_a_missing_package_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without_tensorboard(name, *args, **kwargs):
        if name == "tensorboardX":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tensorboard)
    with pytest.raises(UserError, match="pip install tensorboardX") as caught:
        TensorBoardWriter(tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
