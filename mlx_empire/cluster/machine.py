"""Decides what the machine that runs this process can hold: its memory, and how much of it a run may use.

The limit is the one that the GPU reports: Metal's recommended working set, or most of the memory of a GPU that has
its own (CUDA). Where MLX computes on the CPU it is three quarters of the memory. On Linux the memory is what the
control group allows, where that is less than what is installed.

And how fast it is, measured shortly in the place of the figures that are planned with. Decides what is measured: the
speed of a decoder layer's forward and backward (attention and a gated feed-forward block, grown until one pass takes
a tenth of a second), and the rate at which large arrays are read and written. Disk and network are not measured: a
file just written is read from the cache, and one process sees no network.
"""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_empire.cluster.hostfile import Node, default_limit
from mlx_empire.errors import UserError

OWN_MEMORY_USABLE = 0.95  # of a GPU's own memory: where MLX's allocator stops


OLDEST_MACOS, WIRING_MACOS = 14, 15  # for which MLX has a wheel; with Metal's residency sets


def measure_this_machine() -> Node:
    """The machine of this process as one whole node, named as the network knows it (`socket.gethostname`).

    UserError on a macOS that MLX does not support.
    """
    mac = macos_version()
    if mac is not None and mac < OLDEST_MACOS:
        raise UserError(
            f"{socket.gethostname()}: macOS {platform.mac_ver()[0]}: MLX needs macOS {OLDEST_MACOS} or newer; update it"
        )
    memory = min(_installed_memory(), cgroup_limit(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))
    limit, chip, compiles = default_limit(memory), None, None
    if computes_on_gpu():
        info = mx.device_info()
        if "max_recommended_working_set_size" in info:
            limit = int(info["max_recommended_working_set_size"])
        else:
            memory = int(info["total_memory"])
            limit = int(OWN_MEMORY_USABLE * memory)
        chip = str(info["device_name"])
        compiles = f"{info.get('architecture', chip)} under {_system()}"
    return Node(socket.gethostname(), 1, None, memory, min(limit, memory), None, chip, compiles=compiles)


def computes_on_gpu() -> bool:
    """Whether MLX computes on a GPU here."""
    return bool(mx.default_device().type == mx.DeviceType.gpu)


def macos_version() -> int | None:
    """The first number of this macOS; None elsewhere."""
    mac = platform.mac_ver()[0]
    return int(mac.split(".")[0]) if mac else None


def _system() -> str:
    """What compiles a GPU's kernels while a run goes on: macOS by its version, else the kernel's name."""
    mac = platform.mac_ver()[0]
    return f"macOS {mac}" if mac else platform.system()


def _installed_memory() -> int:
    if sys.platform == "darwin":
        return int(subprocess.check_output(["/usr/sbin/sysctl", "-n", "hw.memsize"]))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cgroup_limit(membership: Path, root: Path) -> int:
    """The least memory limit in bytes of this process's control groups and their parents; 2**63 where none is
    set.

    `membership` is /proc/self/cgroup (lines `id:controllers:path`), `root` where the groups are mounted.
    Version 2 keeps the limit in `memory.max`, version 1 in `memory/.../memory.limit_in_bytes`.
    """
    least = 2**63
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return least
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = base / group.lstrip("/")
        for candidate in (folder, *folder.parents):
            if candidate.is_relative_to(base):
                least = min(least, _read_limit(candidate / name))
    return least


def _read_limit(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return 2**63


LONG_ENOUGH = 0.1  # seconds of one pass
REPEATS = 3
LARGEST_WIDTH = 4096
COPY_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Calibration:
    """What was measured: executed TFLOP/s of a layer, bytes per second of memory; `chip` None for a CPU."""

    machine: str
    chip: str | None
    dtype: str
    tflops: float
    memory_rate: float


def calibrate(dtype: str) -> Calibration:
    """Measure this machine in `dtype` (float32 or bfloat16); a second or two, at most 0.6 GB."""
    chip = str(mx.device_info()["device_name"]) if computes_on_gpu() else None
    width = 256
    speed = _layer_speed(width, dtype)
    while speed[1] < LONG_ENOUGH and width < LARGEST_WIDTH:
        width *= 2
        speed = _layer_speed(width, dtype)
    return Calibration(socket.gethostname(), chip, dtype, speed[0] / speed[1] / 1e12, measured_memory_rate())


def layer_flops(tokens: int, width: int) -> int:
    """Operations of forward and backward of the measured layer: 6 per weight and token, 12 per score and channel."""
    weights = 4 * width * width + 3 * width * 3 * width
    return 6 * weights * tokens + 12 * tokens * tokens * width


def _layer_speed(width: int, dtype: str) -> tuple[int, float]:
    """(operations, seconds) of one forward and backward pass of a layer of this width over `width` tokens."""
    kind, tokens, heads = getattr(mx, dtype), width, width // 64
    keys = mx.random.split(mx.random.key(0), 8)
    shapes = [(width, width)] * 4 + [(width, 3 * width)] * 2 + [(3 * width, width)]
    weights = [
        (mx.random.normal(s, key=k) / s[0] ** 0.5).astype(kind) for s, k in zip(shapes, keys, strict=False)
    ]
    hidden = mx.random.normal((tokens, width), key=keys[7]).astype(kind)

    def layer(w: list[mx.array], x: mx.array) -> mx.array:
        q, k, v = ((x @ m).reshape(1, tokens, heads, 64).transpose(0, 2, 1, 3) for m in w[:3])
        mixed = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125, mask="causal")
        x = x + mixed.transpose(0, 2, 1, 3).reshape(tokens, width) @ w[3]
        gate = x @ w[4]
        x = x + (gate * mx.sigmoid(gate) * (x @ w[5])) @ w[6]
        return x.astype(mx.float32).sum()

    step = mx.grad(layer, argnums=(0, 1))
    mx.eval(weights, hidden)
    return layer_flops(tokens, width), _best(lambda: mx.eval(step(weights, hidden)))


def measured_memory_rate() -> float:
    """Bytes per second of an element-wise sum: two arrays read, one written."""
    a, b = mx.ones(COPY_ELEMENTS), mx.ones(COPY_ELEMENTS)
    mx.eval(a, b)
    return 3 * 4 * COPY_ELEMENTS / _best(lambda: mx.eval(a + b))


def _best(work: Callable[[], object]) -> float:
    """Seconds of the quickest of a few calls; the first, which may compile, is not counted."""
    work()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
