"""`mlx_empire train`, with the CPU seconds of each step: `timed_train.py OUT RECIPE`; see `beside.py`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from mlx_empire.engine.trainer import StepResult, Trainer
from mlx_empire.train.command import main

if __name__ == "__main__":
    seconds: list[float] = []
    plain = Trainer.train_step

    def timed(self: Trainer, *arguments: Any) -> StepResult:
        began = time.process_time()
        taken = plain(self, *arguments)
        seconds.append(time.process_time() - began)
        return taken

    Trainer.train_step = timed  # type: ignore[method-assign]
    code = main(sys.argv[2:])
    Path(sys.argv[1]).write_text(json.dumps(seconds))
    sys.exit(code)
