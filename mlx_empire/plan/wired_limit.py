"""Decides what macOS's limit on the GPU's memory means for a plan: an untouched Mac, and the commands that raise it.

macOS lends the GPU about three quarters of a Mac's memory until somebody says more by `sysctl`, and forgets that when
it starts again. What a machine reports counts in a run; a plan made elsewhere assumes a raised limit for the Macs whose
figure is known (`default_limit`), so it also says what Macs would do that nobody has touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from mlx_empire.cluster.hostfile import Node, default_limit, macos_limit
from mlx_empire.errors import UserError
from mlx_empire.model.spec import ModelSpec
from mlx_empire.plan.chips import is_mac
from mlx_empire.plan.fill import Recomputation
from mlx_empire.plan.optimizer_bytes import StateBytes
from mlx_empire.plan.refusal import require_fit
from mlx_empire.plan.resolve import resolve
from mlx_empire.plan.shares import RunPlan
from mlx_empire.recipe.schema import Recipe
from mlx_empire.sizes import GIB

KEPT_FOR_MACOS = 16 * GIB  # what a raised limit leaves to the system
SYSTEM = "sudo sysctl iogpu.wired_limit_mb"
FORGETS = "macOS forgets the limit when it starts again"


def untouched(node: Node) -> Node:
    """A node that was only planned, as macOS would report it; any other node as it is."""
    if node.measured or not is_mac(node):
        return node
    return replace(node, limit_bytes=min(node.limit_bytes, macos_limit(node.memory_bytes)))


def most_raised(node: Node) -> Node:
    """A Mac with the highest limit that leaves macOS its part; any other node as it is."""
    return _raised(node, node.memory_bytes - KEPT_FOR_MACOS)


def raising(limit_bytes: int) -> str:
    """The command that lets the GPU of a Mac use so many bytes."""
    return f"{SYSTEM}={limit_bytes // 2**20}"


def raising_commands(peaks: Sequence[int], nodes: Sequence[Node], now: Sequence[Node]) -> dict[str, str]:
    """Machine -> the command that it needs before ranks with these peaks fit: the limit of `nodes` where `now` has
    less than the peak. All three by rank; the ranks of one machine add up."""
    needed: dict[str, tuple[int, int, int]] = {}
    for peak, node, own in zip(peaks, nodes, now, strict=True):
        before = needed.get(node.name, (0, 0, 0))
        needed[node.name] = (
            before[0] + peak,
            before[1] + node.limit_bytes,
            before[2] + own.limit_bytes,
        )
    return {name: raising(limit) for name, (peak, limit, has) in needed.items() if peak > has and limit > has}


LEAST_FREE_BYTES = 8 * GIB
LEAST_FREE_PART = 0.1  # of the memory
NEEDS_WIRING = 0.5  # of the limit


def wired_bytes(asked: str | int, peak: int, node: Node) -> tuple[int, str]:
    """(bytes of a rank that macOS may neither page out nor compress, why so many); 0: none are.

    auto: as much as the limit, or what leaves 8 GiB and a tenth of the memory free, where the plan needs more than half
    of the limit and that much covers it. What is wired is faster and, in reports, what made macOS panic when it went
    wrong. UserError for a number above the limit, which MLX would refuse.
    """
    limit = node.limit_bytes
    if asked == "off":
        return 0, "memory.wired: off"
    if asked != "auto":
        if int(asked) > limit:
            raise UserError(
                f"memory.wired: {asked}: {node.name} may use {limit} bytes; lower it, or raise what macOS lends by "
                f"`{raising(int(asked))}`"
            )
        return int(asked), "memory.wired"
    if peak <= NEEDS_WIRING * limit:
        return 0, f"auto: the plan needs {peak / limit:.0%} of the limit"
    most = min(limit, node.memory_bytes - max(LEAST_FREE_BYTES, int(LEAST_FREE_PART * node.memory_bytes)))
    if peak > most:
        return 0, "auto: too little would stay free"
    return most, f"auto: the plan needs {peak / limit:.0%} of the limit"


def fitting_plan(
    recipe: Recipe,
    spec: ModelSpec,
    nodes: Sequence[Node],
    state_bytes: StateBytes,
    noted: Recomputation | None = None,
) -> RunPlan:
    """The plan of a run, as `resolve`. DoesNotFitError where nothing fits, with the commands on Macs that would make it
    fit."""
    plan = resolve(recipe, spec, nodes, state_bytes, noted)
    if plan.fits:
        return plan
    raises: tuple[Callable[[Node], Node], ...] = (_by_default, most_raised)
    for raised in raises:
        higher = [raised(node) for node in nodes]
        better = resolve(recipe, spec, higher, state_bytes) if higher != list(nodes) else plan
        if better.fits:
            peaks = [one.peak for one in better.ledgers]
            limits = {
                node.name: node.limit_bytes * sum(n.name == node.name for n in higher) for node in higher
            }
            commands = raising_commands(peaks, higher, nodes)
            words = [f"on {name} `{words}`" for name, words in commands.items()]
            lines = ", ".join(f"limit={limits[name] // GIB}GiB for {name}" for name in commands)
            require_fit(
                plan,
                nodes,
                f"or raise what macOS lends the GPU: {'; '.join(words)} (in the hostfile {lines})",
            )
    require_fit(plan, nodes)
    return plan


def _by_default(node: Node) -> Node:
    """A Mac whose limit was raised to what a plan assumes."""
    return _raised(node, default_limit(node.memory_bytes))


def _raised(node: Node, limit_bytes: int) -> Node:
    return replace(node, limit_bytes=max(node.limit_bytes, limit_bytes)) if is_mac(node) else node
