"""Decides what `metrics.jsonl` holds: one strict JSON object a line, one line a step or evaluation.

A crash can cut the last line short, and leave lines without their text (a power loss leaves zeros): whoever reads the
file leaves out what is no record, and whoever opens it to go on drops it. Values that JSON has no
word for (NaN, infinities) become null.
"""

import errno
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

from mlx_empire.disk import append_private, replace_private
from mlx_empire.errors import UserError

FILE_NAME = "metrics.jsonl"

# What every record of a step says. Lists are indexed by rank; bytes_sent and bytes_received are of this step
# alone, peak_bytes counts since the run's start. `tokens` are the targets that count in the step, `positions` the input
# positions that pass through the layers for them, on all ranks and with padding (`data.batches.positions`): what a
# plan's speed counts too.
STEP_FIELDS = (
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "positions",
    "positions_per_second",
    "step_seconds",
    "comm_wait_seconds",
    "peak_bytes",
    "predicted_peak_bytes",
    "bytes_sent",
    "bytes_received",
)
EVALUATION_FIELDS = ("step", "eval_loss")


class MetricsWriter:
    """Appends records to `run_dir/metrics.jsonl` (mode 0600); a record survives our end once `write` returns.

    On a full disk records wait in memory for the next write that succeeds: `waiting` says that some do.

    `after_step`: the step from which a resumed run goes on; records of later steps are dropped, because the
    run repeats them. None keeps everything.
    """

    def __init__(self, run_dir: Path, after_step: int | None = None) -> None:
        self.path = Path(run_dir) / FILE_NAME
        self._unwritten = b""
        try:
            if self.path.exists():
                _tidy(self.path, after_step)
            self._file = append_private(self.path)
        except OSError as error:
            raise UserError(
                f"run.dir: {self.path}: {error.strerror}; make it possible to write there"
            ) from None

    @property
    def waiting(self) -> bool:
        """Whether records wait for room on the disk."""
        return bool(self._unwritten)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record: of an evaluation if it has `eval_loss`, else of a step; it may have more names."""
        required = EVALUATION_FIELDS if "eval_loss" in record else STEP_FIELDS
        missing = [name for name in required if name not in record]
        assert not missing, f"a metrics record without {', '.join(missing)}"
        line = json.dumps({name: strict_json(value) for name, value in record.items()}, allow_nan=False)
        self._unwritten += line.encode() + b"\n"
        self._write()

    def _write(self) -> None:
        try:
            while self._unwritten:  # a disk that fills up takes a part of a line; the rest follows
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def close(self) -> None:
        """Close the file; `write` must not be called again."""
        if not self._file.closed:
            self._write()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All records of a run in the order they were written, without what is cut short or damaged."""
    return [record for _, record in _whole((Path(run_dir) / FILE_NAME).read_bytes())]


class MetricsCursor:
    """Reads a run's records while they are written: each call of `follow` gives what is new, and reads no more than
    that. A file that was cut back or replaced, because the run goes on from a checkpoint, is read from its start again.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = Path(run_dir) / FILE_NAME
        self._offset, self._last = 0, b""

    def follow(self) -> tuple[bool, Iterator[dict[str, Any]]]:
        """Whether all that was read before counts no more, and the records from here on. OSError but for no file."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            anew = self._offset > 0
            self._offset, self._last = 0, b""
            return anew, iter(())
        file.seek(self._offset - len(self._last))
        anew = file.read(len(self._last)) != self._last
        if anew:
            self._offset, self._last = 0, b""
        return anew, self._records(file)

    def _records(self, file: BinaryIO) -> Iterator[dict[str, Any]]:
        with file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset, self._last = self._offset + len(line), line
                record = _record(line)
                if record is not None:
                    yield record


def _whole(content: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line that is a record, and the record."""
    for line in content.split(b"\n")[:-1]:
        record = _record(line)
        if record is not None:
            yield line, record


def _record(line: bytes) -> dict[str, Any] | None:
    """The record that a line is; None for another."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def strict_json(value: Any) -> Any:
    """The value in JSON's terms: arrays and their scalars as plain numbers, None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(name): strict_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # numpy's and MLX's arrays and scalars
        return strict_json(value.tolist())
    return value


def _tidy(path: Path, after_step: int | None) -> None:
    """Drop what is cut short or damaged, and records later than `after_step`, by replacing the file at once."""
    before = path.read_bytes()
    kept = [line for line, record in _whole(before) if after_step is None or record["step"] <= after_step]
    after = b"".join(line + b"\n" for line in kept)
    if after != before:
        replace_private(path, after, durable=True)
