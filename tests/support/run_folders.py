"""Folders of runs that nobody trained: what a run writes, with made-up figures and, where asked for, hostile names."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

GIB = 2**30
HOSTILE = "<img src=x onerror=alert(1)>&\"'"
RECIPE = """\
model: {{path: models/scout}}
data: {{path: {data}, sequence_length: 2048}}
batch: {{global_size: 64}}
optimizer: {{learning_rate: {rate}}}
tuning: {{type: {tuning}}}
evaluation:
  sets: [{{path: facts.jsonl, metrics: [exact_match]}}]
  stop_when: {{metric: facts.exact_match, at_least: 0.95}}
report: {{samples: 2}}
run: {{dir: run, steps: {total}, eval_every: 10, save_every: 10}}
"""


def step(number: int, ranks: int = 2, **other: Any) -> dict[str, Any]:
    """The record of a step, with every figure that a page shows; no two steps have the same loss."""
    return {
        "step": number, "loss": 1.0 + math.exp(-number / 50) + 0.05 * math.sin(number), "learning_rate": 1e-5,
        "grad_norm": 0.8 + 0.1 * math.cos(number), "tokens": 1000, "tokens_per_second": 100.0, "positions": 2000,
        "positions_per_second": 200.0, "step_seconds": 10.0, "time": 1000.0 + 10 * number,
        "comm_wait_seconds": 1.5, "waited_for": {"gather": 1.0, "reduce": 0.5, "save": 0.0},
        "wait_seconds": [1.5] * (ranks - 1) + [0.1], "peak_bytes": [300 * GIB] + [150 * GIB] * (ranks - 1),
        "bytes_sent": [GIB] * ranks, "bytes_received": [GIB] * ranks, **other,
    }  # fmt: skip


def evaluation(number: int, name: str = "facts.exact_match") -> dict[str, Any]:
    """The record of an evaluation."""
    return {
        "step": number,
        "eval_loss": 1.1 + math.exp(-number / 50),
        "scores": {name: 0.9 - 0.8 * math.exp(-number / 60)},
    }


def records(first: int, last: int, every: int = 10) -> Iterator[dict[str, Any]]:
    """Steps `first` to `last`, with an evaluation after every tenth."""
    for number in range(first, last + 1):
        yield step(number)
        if number % every == 0:
            yield evaluation(number)


def lines(found: Iterator[dict[str, Any]] | Sequence[dict[str, Any]]) -> str:
    """Records as they stand in metrics.jsonl."""
    return "".join(json.dumps(record) + "\n" for record in found)


def plan(total: int, hosts: Sequence[str]) -> dict[str, Any]:
    """plan.json of ranks on these machines: the first has twice the memory."""
    ranks = []
    for number, host in enumerate(hosts):
        size = 512 if number == 0 else 256
        peak = int(0.62 * size) * GIB
        ranks.append(
            {
                "node": {
                    "name": host,
                    "role": "king" if number == 0 else "soldier",
                    "memory_bytes": size * GIB,
                },
                "share": 0.5,
                "ledger": {"weights": peak // 2, "optimizer m": peak // 2, "nothing": 0},
                "peak_bytes": peak,
                "limit_bytes": int(0.9 * size) * GIB,
            }
        )
    told = {"steps": total, "trainable_parameters": 7, "data_digest": "a", "step_seconds": [8.0, 12.5]}
    return told | {"ranks": ranks}


def continuation(data: str, at: int) -> dict[str, str]:
    """What a model wrote after `at` steps."""
    return {"prompt": "a", "written": f"written after {at} steps: {data}", "held_out": f" b {data}"}


def made_run(
    folder: Path, steps: int = 30, *, total: int = 100, hosts: Sequence[str] = ("king", "soldier-1"),
    data: str = "speeches", rate: str = "1.0e-5", tuning: str = "full", complete: bool = False,
    cause: str | None = None, log: str = "",
) -> Path:  # fmt: skip
    """A run of `steps` steps of `total`; `cause`: of a restart in its middle."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(lines([evaluation(0), *records(1, steps)]))
    (folder / "plan.json").write_text(json.dumps(plan(total, hosts)))
    (folder / "recipe.yaml").write_text(
        RECIPE.format(data=json.dumps(data), rate=rate, tuning=tuning, total=total)
    )
    texts = [
        {
            "tokens": ["a", " b", f" {data}"],
            "probabilities": [None, 0.004, 0.95],
            "counted": [False, True, True],
        }
    ]
    then, now = (
        {"step": at, "texts": [one | {"continued": continuation(data, at)} for one in texts]}
        for at in (0, steps)
    )
    (folder / "samples.json").write_text(json.dumps({"first": then, "last": now}))
    for number in range(10, steps + 1, 10):
        checkpoint = folder / "checkpoints" / f"step-{number:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "COMMIT").write_text("x")
    if cause is not None:
        failure = {
            "time": 1200.0, "rank": 1, "host": hosts[-1], "phase": "backward", "step": steps // 2, "cause": cause,
            "committed": 10, "again": 1230.0,
        }  # fmt: skip
        launch = {
            "pid": 1, "host": hosts[0], "started": 1000.0, "command": "mlx-empire launch scout.yaml", "restarts": 1,
            "machines": list(hosts), "budget": 3, "failures": [failure], "said": "training", "code": None,
            "places": {"0": ["forward", steps + 1], "1": ["reduce", steps + 1]}, "noted": 1000.0,
        }  # fmt: skip
        (folder / "launch.json").write_text(json.dumps(launch))
    if log:
        (folder / "launch.log").write_text(log)
    if complete:
        (folder / "COMPLETE").write_text("\n")
    return folder


def made_long(folder: Path) -> Path:
    """A run of 100,000 steps: a hundred of them again and again, with numbers of their own."""
    made_run(folder, 3, total=100_000)
    written = lines(records(1, 100)).splitlines(keepends=True)
    hundred = [line.removeprefix('{"step": ').partition(",") for line in written]
    with (folder / "metrics.jsonl").open("w") as file:
        for first in range(0, 100_000, 100):
            file.writelines(f'{{"step": {first + int(number)},{rest}' for number, _, rest in hundred)
    return folder
