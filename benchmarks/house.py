"""How many files a reader must open: `python benchmarks/house.py [ROOT]`, of the checkout in ROOT or of this one.

- files of mlx_empire in sys.modules after `import mlx_empire.train.story`;
- files with a function that is executed in a training step of a tiny llama, once everything is warm: on one rank, and
  on two ranks (the files of both) at stage 3 with 8-bit states;
- public functions and classes that two files define, and their files; but what mlx-lm looks up by name in a model's
  file.

Beside each stands the aim, the figure that was stated for commit 008befe (of 207 files; counted in another way, which
was not kept), and what this script says of the tag before-the-house.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import threading
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve()
# What is counted: stated for 008befe, by this script at the tag before-the-house, and the aim.
FIGURES = {"one rank": (27, 22, 20), "two ranks, 8-bit states": (34, 28, 25), "imports": (168, 176, 120)}
COMMANDS = ("main", "parser", "read")  # every command's
INTERFACE = ("Model", "ModelArgs")  # mlx-lm's, of the file of a model
SETTINGS: dict[str, dict[str, Any]] = {"one rank": {}, "two ranks, 8-bit states": {"state_bits": 8}}


def executed(setting: str) -> list[str]:
    """The files of mlx_empire in which a function runs during this rank's second step."""
    from support.stepping import Case, batches_of, counted_tokens, own_batches, trainer_of

    from mlx_empire.comm.connect import connect
    from mlx_empire.comm.thread import CommThread

    package = str(Path(sys.modules["mlx_empire"].__path__[0])) + "/"
    files: set[str] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            files.add(frame.f_code.co_filename)

    case = Case(steps=2, **SETTINGS[setting])
    threading.setprofile(note)  # threads that start from now on; what they do before the step is dropped
    comm = connect()
    with CommThread() as thread:
        trainer = trainer_of(case, comm, thread)
        for step in range(case.steps):
            batches = batches_of(case, step)
            own = own_batches(trainer, batches, comm.rank)
            files.clear()
            sys.setprofile(note)
            trainer.train_step(own, counted_tokens(batches), step + 1, case.learning_rate)
            sys.setprofile(None)
        found = sorted(f.removeprefix(package) for f in files if f.startswith(package))
    return found


def imports(root: Path) -> int:
    """Modules of mlx_empire after importing train, packages included."""
    code = (
        "import sys, mlx_empire.train.story; print(sum(n.split('.')[0] == 'mlx_empire' for n in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    return int(done.stdout)


def two_meanings(root: Path) -> dict[str, list[str]]:
    """Public functions and classes that several files define; but those of every command."""
    homes: dict[str, list[str]] = defaultdict(list)
    for file in sorted((root / "mlx_empire").rglob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                if file.parent.name == "families" and node.name in INTERFACE:
                    continue
                homes[node.name].append(str(file.relative_to(root / "mlx_empire")))
    return {name: files for name, files in sorted(homes.items()) if len(files) > 1 and name not in COMMANDS}


def main(root: Path) -> None:
    """Print the counts."""
    from support.mpi import run_ranks

    alone = subprocess.run(
        [sys.executable, str(HERE), str(root), "one rank"], capture_output=True, text=True, check=True
    )
    steps = {
        "one rank": [json.loads(alone.stdout)],
        "two ranks, 8-bit states": run_ranks(2, HERE, [root, "two ranks, 8-bit states"]),
    }
    for name, ranks in steps.items():
        files = sorted({file for rank in ranks for file in rank["files"]})
        line("files that run in a step, " + name, len(files), *FIGURES[name])
        print("  " + " ".join(files))
    line("files imported by train", imports(root), *FIGURES["imports"])
    total = sum(1 for _ in (root / "mlx_empire").rglob("*.py"))
    print(f"files in mlx_empire: {total}")
    double = two_meanings(root)
    print(f"public functions and classes with two meanings: {len(double)} (aim 0; before-the-house 24)")
    for name, homes in double.items():
        print(f"  {name}: {', '.join(homes)}")


def line(what: str, count: int, stated: int, before: int, aim: int) -> None:
    """One count with the figures before and the aim."""
    print(f"{what}: {count} (aim {aim}; before-the-house {before}; stated for 008befe {stated})")


if __name__ == "__main__":
    place = Path(sys.argv[1] if len(sys.argv) > 1 else HERE.parents[1]).resolve()
    sys.path[:0] = [str(place), str(place / "tests")]
    if len(sys.argv) > 2:
        from support.mpi import REPORTS, report

        found = {"files": executed(sys.argv[2])}
        if REPORTS in os.environ:
            report(found)
        else:
            print(json.dumps(found))
    else:
        main(place)
