"""What a launcher leaves in the run's folder, and what it and others read there.

`launch.json`: who supervises the run and how it goes. `launch.lock`: held for as long as the launcher lives
(`run.lock`), so a dead one is told from a living one whatever its process id is today. `launch.log`: the output of a
detached run.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from mlx_empire.checkpoint.paths import COMMIT, steps_in
from mlx_empire.disk import replace_private
from mlx_empire.errors import UserError
from mlx_empire.recipe.schema import Recipe
from mlx_empire.run.lock import LAUNCHER, RunLock, is_held

STATE, LOG, COMPLETE = "launch.json", "launch.log", "COMPLETE"


@dataclass
class LaunchState:
    """What `launch.json` says. Times in seconds since 1970; `code` is None while the run goes on.

    places: by rank, its phase and step (`progress.PHASES`) as of `noted`; empty where no rank has told.
    """

    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    started: float = field(default_factory=time.time)
    command: str = ""
    machines: list[str] = field(default_factory=list)
    restarts: int = 0
    budget: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    said: str = ""
    code: int | None = None
    places: dict[str, tuple[str, int]] = field(default_factory=dict)
    noted: float = 0.0


class RunFolder:
    """A run's folder as its launcher sees it; use as a context manager, which keeps others away."""

    def __init__(self, path: Path, checkpoints: Path | None = None) -> None:
        """`checkpoints`: where rank 0 keeps them, if not in the run's folder."""
        self.path = path
        self.checkpoints = checkpoints or path / "checkpoints"
        self._lock: RunLock | None = None

    def take(self) -> bool:
        """Lock the folder if it is there yet (the run makes it when it may begin); whether it is ours.

        UserError when another launcher holds it.
        """
        if self._lock is None and self.path.is_dir():
            self._lock = RunLock(self.path, LAUNCHER)
        return self._lock is not None

    def make(self) -> None:
        """Make the folder, readable by its owner only; UserError where that is impossible."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"run.dir: {self.path}: {error.strerror}; choose a folder that can be written"
            ) from None

    def write(self, state: LaunchState) -> None:
        """`launch.json`, replaced at once; nothing where the folder is not ours yet."""
        if self.take():
            replace_private(self.path / STATE, json.dumps(asdict(state), indent=1) + "\n")

    @property
    def complete(self) -> bool:
        """Whether the run wrote `COMPLETE`."""
        return (self.path / COMPLETE).exists()

    @property
    def saved(self) -> dict[int, Path]:
        """The committed checkpoints on this machine by step, ascending."""
        found = steps_in(self.checkpoints)
        return {step: path for step, path in found.items() if (path / COMMIT).is_file()}

    @property
    def committed(self) -> int | None:
        """The step of the newest committed checkpoint on this machine."""
        return max(self.saved, default=None)

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def run_folder(recipe: Recipe) -> RunFolder:
    """The folder of the recipe's run, with the checkpoints of the rank on this machine: rank 0."""
    if recipe.run.checkpoints is None:
        return RunFolder(recipe.run.dir)
    filled = str(recipe.run.checkpoints).replace("{rank}", "0").replace("{host}", socket.gethostname())
    return RunFolder(recipe.run.dir, Path(filled))


def supervised(path: Path) -> bool:
    """Whether a launcher is at work in the folder, on this machine."""
    return is_held(path, LAUNCHER)


def read_state(path: Path) -> LaunchState | None:
    """What `launch.json` says; None where no launcher was here. UserError for a file that cannot be understood."""
    try:
        return LaunchState(**json.loads((path / STATE).read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path / STATE}: cannot be read ({error}); remove it") from None
