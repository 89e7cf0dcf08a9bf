"""Stands in for mpirun: does what a script in the folder says, one line a launch.

`save 3`: commit the checkpoint of step 3. `place RANK PHASE STEP`, `fail CODE MESSAGE`, `notice KIND MESSAGE` and
`die RANK SIGNAL` say what ranks and mpirun say. `complete`, `exit N`, `sleep SECONDS`; `wait`: for SIGUSR1, then tell
143; `ignore`: signals. Separated by semicolons.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

DASHES = "-" * 74


def tell(**event: object) -> None:
    print(
        "@mlx_empire " + json.dumps({"rank": 0, "host": "king", "pid": 1, **event}),
        file=sys.stderr,
        flush=True,
    )


def wait_for_a_request() -> None:
    heard: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    tell(event="place", thread="MainThread", phase="data", step=1)
    while not heard:
        time.sleep(0.02)
    tell(event="exit", code=143)
    sys.exit(143)


def main(run: Path) -> None:
    run.mkdir(exist_ok=True)
    script = run.parent / "launches"
    first, _, rest = script.read_text().partition("\n")
    script.write_text(rest)
    for action in first.split(";"):
        verb, *words = action.split()
        match verb:
            case "save":
                folder = run / "checkpoints" / f"step-{int(words[0]):06d}"
                folder.mkdir(parents=True)
                (folder / "COMMIT").touch()
            case "place":
                tell(
                    event="place", rank=int(words[0]), thread="MainThread", phase=words[1], step=int(words[2])
                )
            case "fail":
                tell(event="failure", code=int(words[0]), message=" ".join(words[1:]))
            case "notice":
                tell(event="notice", kind=words[0], message=" ".join(words[1:]))
            case "die":
                said = f"prterun noticed that process rank {words[0]} with PID 7 on node king exited on"
                print(DASHES, said, f"signal {words[1]} (x).", DASHES, sep="\n", file=sys.stderr, flush=True)
            case "complete":
                (run / "COMPLETE").touch()
            case "sleep":
                time.sleep(float(words[0]))
            case "ignore":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            case "wait":
                wait_for_a_request()
            case "exit":
                sys.exit(int(words[0]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
