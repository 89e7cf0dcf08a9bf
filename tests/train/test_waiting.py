"""A finished run whose result is refused repeats what was refused, and nothing else: as functions, without a run."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest

from mlx_empire.comm.failure import AgreedExit
from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.errors import NoRoomError, NumericsError, UserError
from mlx_empire.run import result

FULL = OSError(errno.ENOSPC, "No space left on device")
COMM = SoloCommunicator("here")


def raising(*errors: Exception | None) -> Callable[[], None]:
    """A function that raises the first error the first time, and so on; None: it returns."""
    left: Iterator[Exception | None] = iter(errors)

    def work() -> None:
        if (error := next(left)) is not None:
            raise error

    return work


@pytest.mark.parametrize(
    ("error", "needed"),
    [
        (NoRoomError("needs room", 7), 7),
        (NoRoomError("no room all the same"), 0),
        (FULL, 0),
        (UserError("final: holds files that are not ours"), None),
        (PermissionError(errno.EACCES, "Permission denied"), None),
    ],
)
def test_what_a_disk_or_a_person_can_mend_is_waited_for(error: Exception, needed: int | None) -> None:
    assert result.attempted(COMM, raising(error)) == result.Refusal(str(error), needed)


def test_what_nobody_can_mend_ends_the_run() -> None:
    assert result.attempted(COMM, raising(None)) is None
    with pytest.raises(AgreedExit) as ended:
        result.attempted(COMM, raising(NumericsError("reads back differently")))
    assert ended.value.code == 65


def test_a_daughters_result_waits_for_room_and_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(result.time, "sleep", waited.append)
    told: list[str] = []
    result.until_there_is_room(raising(NoRoomError("needs 1 GB", 10**9), FULL, None), told.append)
    assert told == ["waits for room: needs 1 GB"]
    assert len(waited) == 2
    with pytest.raises(PermissionError):
        result.until_there_is_room(raising(PermissionError(errno.EACCES, "no")), told.append)
    with pytest.raises(UserError, match="not ours"):
        result.until_there_is_room(raising(UserError("not ours")), told.append)
    assert len(waited) == 2
