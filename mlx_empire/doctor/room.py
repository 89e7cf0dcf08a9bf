"""A recipe beside the machines as they are now: does it fit the memory that the GPU may use, and the disks?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mlx_empire.cluster.hostfile import Cluster, Node
from mlx_empire.cluster.match import match_ranks
from mlx_empire.doctor.findings import Findings
from mlx_empire.formats.hf_folder import stored_if_whole
from mlx_empire.model.target import planned_target
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.assess import assess
from mlx_empire.recipe.schema import Recipe
from mlx_empire.run.disks import assume_disks, ledgers_of, places_of, remedies, what_else
from mlx_empire.sizes import amount


def hold_against(
    recipe: Recipe, cluster: Cluster, measured: Mapping[str, tuple[Node, int]], findings: Findings
) -> None:
    """Rows on memory and disks for the recipe; `measured`: what each machine of the hostfile has, and the bytes that
    are free for runs there. UserError where no plan can be made."""
    names = [host.name for host in cluster.nodes for _ in range(host.slots)]
    nodes = match_ranks(cluster, names, [measured[name][0] for name in names])
    nodes = [replace(node, disk_bytes=measured[name][1]) for node, name in zip(nodes, names, strict=True)]
    _memory(recipe, nodes, findings)


def _memory(recipe: Recipe, nodes: Sequence[Node], findings: Findings) -> None:
    target = planned_target(recipe, stored_if_whole)
    assessment = assess(recipe, target.spec, nodes, state_bytes_of)
    for node, ledger in zip(nodes, assessment.nodes, strict=True):
        found = f"the plan needs {amount(ledger.peak_bytes)} of {amount(node.limit_bytes)}"
        short = ledger.peak_bytes > node.limit_bytes
        findings.add("memory for the recipe", node.name, found, not short, _CAPACITY if short else "")
    places = places_of([assume_disks(recipe, rank, node) for rank, node in enumerate(nodes)])
    steps = int(recipe.run.steps.value) if recipe.run.steps.unit == "steps" else None
    for disk in ledgers_of(recipe, target, assessment.plan, places, steps, what_else(recipe, target)):
        free = "not known" if disk.free is None else amount(disk.free)
        found = disk.reason or f"asked for {amount(disk.asked)}, {free} are free"
        mend = remedies(recipe) if disk.verdict in ("no", "tight") else ""
        findings.add("disk for the recipe", disk.name, found, disk.verdict != "no", mend)


_CAPACITY = "python -m mlx_empire.capacity RECIPE --hosts HOSTFILE says what to change"
