"""What only a run can show: a tiny model is trained over all machines twice, once with its last process killed.

Once undisturbed, once killed at step 6 and started again: the losses must be the same bits. On Macs it is watched
whether macOS keeps the machines awake meanwhile, and how long the killed process's wired memory stays away. Needs the
repository, for the recipe trains its tests' tiny model. Not run in CI on macOS.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from mlx_empire.cluster.hostfile import Cluster, Host
from mlx_empire.cluster.macos import read_vm_stat
from mlx_empire.cluster.reach import ask
from mlx_empire.doctor.findings import Findings

MAC = sys.platform == "darwin"
STEPS, KILLED_AT = 12, 6
WATCH_SECONDS = 2.0
RECLAIM_SECONDS = 300.0
RECIPE = """\
model: {path: tests/fixtures/tiny-llama-260k, dtype: float32}
data: {path: tests/fixtures/wordnet, format: chat, sequence_length: 64}
batch: {global_size: 8, micro_size: 1, cells: 4}
optimizer: {learning_rate: 1.0e-3}
"""


def train_twice(
    hostfile: Path, runs: Path, cluster: Cluster, environment: Mapping[str, str], findings: Findings
) -> None:
    """The runs over all machines of the hostfile, into folders in `runs`."""
    for name in ("plain", "killed"):
        shutil.rmtree(runs / name, ignore_errors=True)
    runs.mkdir(parents=True, exist_ok=True)
    (runs / "recipe.yaml").write_text(RECIPE)
    wired = {host.name: _wired_bytes(host, environment) for host in cluster.nodes}
    plain = _launch(hostfile, runs / "plain", {}, lambda: None)
    findings.add("a run over all machines", str(hostfile), f"exit code {plain}", plain == 0)
    if plain != 0:  # its own words stand above
        return
    awake: set[str] = set()
    last = sum(host.slots for host in cluster.nodes) - 1
    once = (runs / "killed" / "struck").absolute()  # a folder that every machine has by then
    fault = f"rank={last};step={KILLED_AT};phase=backward;action=kill;once={once}"
    killed = _launch(
        hostfile,
        runs / "killed",
        {"MLX_EMPIRE_FAULT": fault},
        lambda: _note_awake(cluster, environment, awake),
    )
    findings.add("the last process killed", str(hostfile), f"exit code {killed}", killed == 0)
    same = _losses(runs / "plain") == _losses(runs / "killed") != []
    findings.add("its losses", str(hostfile), "the same bits" if same else "DIFFERENT", same)
    if MAC:
        for host in cluster.nodes:
            kept = host.name in awake
            findings.add("kept awake by caffeinate", host.name, "yes" if kept else "no", kept)
            _reclaimed(host, wired[host.name], environment, findings)


def _launch(hostfile: Path, folder: Path, extra: dict[str, str], watch: Callable[[], None]) -> int:
    """A launch of the recipe beside `folder` into it; `watch` is called every few seconds while it runs."""
    settings = [f"run.dir={folder}", f"run.steps={STEPS}", "run.save_every=2"]
    command = [
        sys.executable,
        "-m",
        "mlx_empire.launch",
        str(hostfile),
        str(folder.parent / "recipe.yaml"),
        *settings,
    ]
    process = subprocess.Popen(command, env=os.environ | extra)
    done = threading.Event()

    def look_now_and_then() -> None:
        while not done.wait(WATCH_SECONDS):
            watch()

    watcher = threading.Thread(target=look_now_and_then)
    watcher.start()
    try:
        return process.wait()
    finally:
        done.set()
        watcher.join()


def _note_awake(cluster: Cluster, environment: Mapping[str, str], awake: set[str]) -> None:
    """Note which machines `caffeinate` holds awake."""
    if MAC:
        for host in cluster.nodes:
            with suppress(OSError, subprocess.SubprocessError):
                if "caffeinate" in ask(host, ["/usr/bin/pmset", "-g", "assertions"], environment).stdout:
                    awake.add(host.name)


def _losses(folder: Path) -> list[float]:
    """The losses of a run, step by step."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def _wired_bytes(host: Host, environment: Mapping[str, str]) -> int | None:
    """What a Mac holds wired."""
    if not MAC:
        return None
    try:
        return read_vm_stat(ask(host, ["/usr/bin/vm_stat"], environment).stdout)
    except (OSError, subprocess.SubprocessError):
        return None


def _reclaimed(host: Host, before: int | None, environment: Mapping[str, str], findings: Findings) -> None:
    """How long it takes until a machine holds no more wired memory than before."""
    start = time.monotonic()
    while time.monotonic() - start < RECLAIM_SECONDS:
        now = _wired_bytes(host, environment)
        if now is None or before is None or now <= before + (1 << 30):
            break
        time.sleep(WATCH_SECONDS)
    seconds = time.monotonic() - start
    findings.add("wired memory free again", host.name, f"after {seconds:.0f} s", seconds < RECLAIM_SECONDS)
