"""Which kernels nodes have, as far as is known: the same ones everywhere, Metal's with little memory, or a CPU's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version

from mlx_empire.cluster.hostfile import Node
from mlx_empire.plan.chips import is_mac, on_cpu


def kernels_differ(nodes: Sequence[Node]) -> str:
    """What the GPUs' kernels are compiled for and by, where that differs between nodes; empty where it does not."""
    found = {node.compiles: node.name for node in reversed(nodes) if node.compiles is not None}
    return (
        ", ".join(f"{name}: {compiles}" for compiles, name in reversed(found.items()))
        if len(found) > 1
        else ""
    )


def linear_in(mlx: str) -> bool:
    """Whether this version of MLX has the backward of causal attention on Metal whose memory is linear in the width."""
    numbers = re.findall(r"\d+", mlx)[:3]
    return tuple(map(int, numbers)) >= (0, 32, 4)


LINEAR = linear_in(version("mlx"))


def has_metal(node: Node) -> bool:
    """Whether a node is known to compute on Apple's GPU; a hostfile says so by its chip, such as chip=M3-Ultra."""
    return node.chip is not None and is_mac(node)


def is_cpu(node: Node) -> bool:
    """Whether a node was asked and computes on a CPU."""
    return node.measured and node.compiles is None and node.chip is None


def on_cpus(nodes: Sequence[Node]) -> bool:
    """Whether all nodes compute on CPUs, as far as is known: on others some things are off until a Mac has run them."""
    return all(is_cpu(n) or (not n.measured and on_cpu(n)) for n in nodes)
