"""Reports and surveys with every case that a page or a table must show, with hostile names, and made-up figures."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from support.planning import assess, llama_like, node_of, nodes_of, recipe_of

from mlx_empire.capacity.daughter_document import DaughterSurvey
from mlx_empire.capacity.daughters import DaughterRun, Serving
from mlx_empire.capacity.document import CapacityReport
from mlx_empire.capacity.ladder import Rung
from mlx_empire.capacity.matrix import Cell, Comparison, Difference, Matrix, MatrixRow
from mlx_empire.capacity.survey_document import LadderSurvey, MatrixSurvey
from mlx_empire.capacity.whatif import Advice
from mlx_empire.cluster.hostfile import Node
from mlx_empire.model.spec import ModelSpec, TensorSpec, UnitSpec
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.assess import Assessment, NodeAssessment
from mlx_empire.plan.chips import chip_named
from mlx_empire.plan.disk import DiskLedger, Keeping
from mlx_empire.plan.hardware import WIRES, wire_named
from mlx_empire.plan.lengths import Every, Lengths
from mlx_empire.plan.memory import Ledger
from mlx_empire.plan.pace import Cloud, Pace
from mlx_empire.plan.step_time import COMPUTE, EXCHANGE, Event, Timeline

GIB = 2**30
HOSTILE = '<img src=x onerror=alert(1)>&"'
CLUSTERS = ("1K+3S", "2K+2S", "3K+1S", "4K")


def node(
    name: str, role: str | None, memory: int, limit: int, verdict: str, **gibibytes: float
) -> NodeAssessment:
    """A node that a plan was held against; `gibibytes` is its ledger."""
    ledger = {key.replace("_", " "): int(size * GIB) for key, size in gibibytes.items()}
    return NodeAssessment(
        Node(name, 1, role, memory * GIB, limit * GIB, measured=False),
        0.25,
        Ledger(ledger, {"backward": {}}),
        limit * GIB,
        3 * GIB,
        3 * limit * GIB // 4,
        21_000,
        verdict,
        "" if verdict == "fits" else f"{name} is short of memory",
    )


def assessed(*nodes: NodeAssessment) -> Assessment:
    """A large mixture of experts on these nodes."""
    plan = assess(recipe_of(), llama_like(), nodes_of([GIB] * len(nodes))).plan
    root = UnitSpec(
        "root",
        (
            TensorSpec("dense", (11_132_235_840,), "bfloat16"),
            TensorSpec("norms", (861_120,), "bfloat16", trainable=False),
            TensorSpec("experts", (16, 1, 6_039_797_760), "bfloat16"),
        ),
    )
    spec = ModelSpec(f"scout {HOSTILE}", "llama4", "bfloat16", (root,), {"num_local_experts": 16})
    return Assessment(spec, recipe_of(), plan, nodes, state_bytes_of)


def report() -> CapacityReport:
    """A node that fits, one that is tight, one that does not fit and one with a hostile name."""
    nodes = (
        node("king", "king", 512, 464, "fits", weights=100, optimizer_m=150, gradients=90, gathered_units=12),
        node(
            "soldier-1", "soldier", 256, 208, "tight", weights=60, optimizer_m=90, gradients=50, attention=5
        ),
        node(
            "soldier-2", "soldier", 256, 208, "no", weights=60, optimizer_m=90, gradients=50, logits_chunk=30
        ),
        node(HOSTILE, None, 128, 96, "fits", weights=20, adapters=5, MLX_base=1),
    )
    advice = (
        Advice("memory.shares=memory", "soldiers need 167 GiB", "fits"),
        Advice(f"sudo {HOSTILE}", "raises the limit", "tight"),
    )
    paces = (pace("10gbe", "network", 2.0), pace("thunderbolt", "compute", 1.0))
    cloud = Cloud(8, (3.0, 5.0), (100.0, 200.0), "8 x H100 would take 3 to 5 hours")
    disks = (
        DiskLedger("a", "king", 276 * GIB, 111 * GIB, Keeping(10, 3, True), 201 * GIB, 0, GIB, 1700 * GIB),
        DiskLedger("b", HOSTILE, 111 * GIB, 276 * GIB, Keeping(10, 3, True), 0, 0, 0, 200 * GIB),
        DiskLedger("c", "soldier-2", 111 * GIB, 0, Keeping(1, 3, True), 0, 0, 0, None),
    )
    start = datetime(2026, 11, 20, 20)
    return CapacityReport(
        assessed(*nodes),
        f"no {HOSTILE} here",
        paces,
        advice,
        cloud,
        [chip_named("M3 Ultra")],
        start,
        disks,
        untouched="no",
    )


def pace(wire: str, bound: str, factor: float) -> Pace:
    """What a wire makes of the plan; the node with the hostile name works, and its network."""
    seconds = 50.0 * factor
    events = (
        Event(3, COMPUTE, "forward", 1, 0.0, 10.0),
        Event(3, COMPUTE, "backward", 1, 12.0, 40.0),
        Event(3, EXCHANGE, "gather", 1, 0.0, 9.0),
        Event(3, EXCHANGE, "reduce", 1, 20.0, seconds),
    )
    return Pace(
        (seconds, 120.0 * factor),
        (1092.0 / factor, 2621.0 / factor),
        (14.0 * factor, 33.0 * factor),
        (15.0, 36.0),
        bound,
        {"compute": (50.0, 120.0), "network": (100.0, 100.0)},
        wire_named(wire),
        Lengths(1000, 0, Every(100), Every(seconds=1800.0), Every()),
        Timeline(events, seconds, 0.0),
    )


def matrix() -> MatrixSurvey:
    """Two models, one of them not trainable; each verdict occurs, once against the pooled arithmetic."""
    cells = {
        name: Cell(verdict, 3, headroom, pooled, "king", 1, 1, 1, 7.0, "")
        for name, verdict, headroom, pooled in zip(
            CLUSTERS,
            ("no", "tight", "fits", "fits"),
            (-1.4, 0.03, 0.2, 0.9),
            ("fits", "tight", "fits", "fits"),
            strict=True,
        )
    }
    rows = tuple(
        MatrixRow(model, 179_522_035_712, 179_522_035_712, barred, cells)
        for model, barred in ((HOSTILE, None), ("falcon-180b", f"mlx-lm has no {HOSTILE}"))
    )
    difference = Difference(HOSTILE, "4K", "NO", "fits", f"{HOSTILE}, so it fits")
    return MatrixSurvey(
        Matrix(CLUSTERS, {CLUSTERS[0]: 1280 * GIB}, {}, rows), Comparison((difference,), 7, ("x",))
    )


def ladder() -> LadderSurvey:
    """Three rungs: far too large, just too large, and fitting."""
    rungs = [
        Rung(
            name,
            assessed(
                node("king", "king", 512, 464, verdict, weights=peak),
                node("soldier", "soldier", 256, 208, verdict, weights=peak / 2),
            ),
            ("llama-2-13b", 13_015_864_320) if dense else None,
            None,
        )
        for name, peak, verdict, dense in (
            ("pure", 4000, "no", True),
            (f"+ {HOSTILE}", 480, "no", True),
            ("+ another", 300, "fits", False),
        )
    ]
    return LadderSurvey("scout", rungs)


def daughters() -> DaughterSurvey:
    """One way of training on one machine, served and placed."""
    machine, way = node_of(HOSTILE, 208 * GIB), "QLoRA, 4-bit base"
    alone = assessed(node(HOSTILE, None, 256, 208, "fits", weights=89))
    trained = replace(pace("10gbe", "compute", 1.0), positions_per_second=(46.7, 112.0), run_hours=(1.5, 3.6))
    served = Serving(way, machine, 56 * GIB, GIB // 5, GIB // 3, 3, 242, (10.0, 20.0))
    return DaughterSurvey(
        "scout",
        "mlx-lm has no lora",
        [DaughterRun(way, machine, alone, trained, None)],
        [served],
        [machine],
        2,
    )


def fitting() -> tuple[CapacityReport, MatrixSurvey, LadderSurvey, DaughterSurvey]:
    """As large a model, and as many machines, wires, models, rungs and ways as README's example has: all of it fits."""
    king = node("king", "king", 512, 464, "fits", weights=100, optimizer_m=150, gradients=90)
    soldier = node("soldier-1", "soldier", 256, 208, "fits", weights=60, optimizer_m=90, gradients=30)
    others = (replace(soldier, node=replace(soldier.node, name=f"soldier-{i}")) for i in (2, 3))
    every = assessed(king, soldier, *others)
    whole = report()
    disks = tuple(replace(whole.disks[0], name=one.node.name) for one in every.nodes)
    advice = tuple(Advice(f"batch.micro_size={size}", "a little faster", "fits") for size in range(2, 7))
    paces = tuple(pace(wire.key, "compute", 1.0) for wire in WIRES)
    first = matrix().by_size[0].cells
    alike = {name: replace(cell, verdict="fits", pooled_says="fits") for name, cell in first.items()}
    rows = [
        MatrixRow(f"model-{i}-109b", 10**9 * (i + 1), 10**9, None, first if i < 7 else alike)
        for i in range(35)
    ]
    rungs = [replace(rung, name=f"+ technique {i}") for i in range(3) for rung in ladder().rungs]
    tuned = daughters()
    return (
        replace(whole, assessment=every, disks=disks, advice=advice, paces=paces, untouched=None),
        MatrixSurvey(Matrix(CLUSTERS, {}, {}, tuple(rows)), None),
        LadderSurvey("scout", rungs),
        replace(tuned, runs=8 * list(tuned.runs), served=8 * list(tuned.served)),
    )
