"""What is asked about the documents' numbers, answered by the plan of this program: bytes, verdicts, seconds, dollars.

No answer is written down here; what a document leaves open is `assumed`.
"""

from __future__ import annotations

from collections.abc import Callable

from mlx_empire.claims.answering import least_memory, models_held, served, swap
from mlx_empire.claims.assumed import ADAPTERS, EMPIRE, SCOUT, TECHNIQUES, machine, on_one, planned, scout
from mlx_empire.claims.judge import TO_MEASURE, Ours, gb
from mlx_empire.model import catalog
from mlx_empire.model.target import catalog_target, shaped_target
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.assess import Assessment
from mlx_empire.plan.chips import GIGA, chip_named, price_of
from mlx_empire.plan.hardware import DOLLARS_PER_KWH, WIRES, YEARS_OF_USE, hourly_wear, standard_clusters
from mlx_empire.plan.intentions import INTENTIONS, compute_hours
from mlx_empire.plan.largest import DENSE, MIXTURE, largest
from mlx_empire.plan.lengths import DataSize, Lengths
from mlx_empire.plan.pace import Pace, cloud_of, pace_of, run_dollars, spell
from mlx_empire.plan.serving import resting_bytes
from mlx_empire.plan.work import flops_per_token, trained_bytes
from mlx_empire.recipe.changes import variant
from mlx_empire.sizes import GIB

WORDS = {"fits": "yes", "tight": "tight", "no": "no"}  # of a verdict, as the documents say it


def nodes_added(found: Assessment) -> str:
    """`king 417 + soldier 210 + ...`."""
    return " + ".join(f"{n.node.name} {n.peak_bytes / GIGA:,.0f}" for n in found.nodes)


def installed(cluster: str) -> Ours:
    nodes = standard_clusters()[cluster]
    return Ours(
        sum(n.memory_bytes for n in nodes) / 1e12,
        f"{' + '.join(str(n.memory_bytes // GIB) for n in nodes)} GiB",
    )


def may_use(cluster: str) -> Ours:
    nodes = standard_clusters()[cluster]
    limits = " + ".join(str(n.limit_bytes // GIB) for n in nodes)
    return Ours(sum(n.limit_bytes for n in nodes) / GIGA, f"what the GPUs may use: {limits} GiB")


def total(model: str = SCOUT, cluster: str = EMPIRE, techniques: str = "product") -> Ours:
    found = planned(model, cluster, techniques)
    return Ours(
        sum(n.peak_bytes for n in found.nodes) / GIGA, f"ZeRO-{found.zero_stage}, peaks: {nodes_added(found)}"
    )


def left(model: str = SCOUT, cluster: str = EMPIRE) -> Ours:
    found = planned(model, cluster, "product")
    worst = found.worst
    return Ours(
        sum(n.headroom_bytes for n in found.nodes) / GIGA,
        f"limits less peaks; on the fullest, {worst.node.name}, {gb(worst.headroom_bytes)}",
    )


def fit_verdict(model: str = SCOUT, cluster: str = EMPIRE, techniques: str = "product") -> Ours:
    found = planned(model, cluster, techniques)
    worst = found.worst
    need = f"{worst.node.name} needs {gb(worst.peak_bytes)} of {gb(worst.limit_bytes)}"
    return Ours(WORDS[found.verdict], f"ZeRO-{found.zero_stage}: {need}")


def stage(model: str = SCOUT, cluster: str = EMPIRE) -> Ours:
    whole = sum(u.gathered_bytes for u in planned(model, cluster, "product").plan.shards.units)
    found = planned(model, cluster, "product")
    return Ours(f"stage {found.zero_stage}", f"below stage 3 every machine keeps all weights, {gb(whole)}")


def per_parameter(model: str = SCOUT, cluster: str = EMPIRE) -> Ours:
    found = planned(model, cluster, "product")
    count = found.spec.base_parameters
    parts = {name: size / count for name, size in trained_bytes(found).items()}
    return Ours(sum(parts.values()), " + ".join(f"{name} {size:.2f}" for name, size in parts.items()))


def largest_model(kind: str, cluster: str = EMPIRE, techniques: str = "all") -> Ours:
    name = DENSE if kind == "dense" else MIXTURE
    recipe, (config, _) = variant(scout(), TECHNIQUES[techniques]), catalog.load(name)
    nodes = standard_clusters()[cluster]
    found = largest(recipe, config, lambda one: shaped_target(one, name, recipe).spec, nodes, state_bytes_of)
    if found is None:
        return Ours("none", f"not even the narrowest of {name}'s shape fits")
    each = sum(trained_bytes(found.assessment).values()) / found.parameters
    shape = f"{name}'s shape with {found.layers} layers of {found.heads} heads"
    return Ours(
        found.parameters / 1e9, f"{shape}, {each:.1f} bytes per parameter; one more layer does not fit"
    )


def rented(model: str, cluster: str = EMPIRE) -> Ours:
    found = planned(model, cluster, "all")
    cloud = cloud_of(found, Lengths.of(found.recipe, DataSize.assumed(found.recipe)), None)
    batch, steps = (
        found.recipe.batch.global_size * found.recipe.data.sequence_length,
        found.recipe.run.steps.value,
    )
    return Ours(
        cloud.dollars, f"{steps:,.0f} steps of {batch:,} tokens: {cloud.gpus} H100 for {spell(cloud.hours)} h"
    )


def slower_by_recomputing(model: str = SCOUT) -> Ours:
    once, again = (
        flops_per_token(found.spec, found.plan.work)
        for found in (planned(model, EMPIRE, "pure-half"), planned(model, EMPIRE, "half"))
    )
    return Ours(
        100 * (again / once - 1), f"operations per token {again / 1e9:,.0f} G where {once / 1e9:,.0f} G"
    )


def states_saved() -> Ours:
    sizes = []
    for bits in (32, 8):
        states = state_bytes_of(variant(scout(), {"optimizer.state_bits": bits}).optimizer)
        named = dict(states(1 << 20, "bfloat16", quantised=True).items())
        sizes.append({name: size / (1 << 20) for name, size in named.items()})
    wide, narrow = sizes
    spelled = " + ".join(f"{name} {size:.2f}" for name, size in narrow.items())
    return Ours(
        100 * (1 - sum(narrow.values()) / sum(wide.values())),
        f"bytes per parameter with 8 bits {spelled}, with 32 {sum(wide.values()):.2f}: the exact masters stay",
    )


def adapters_on(model: str, gb: float, chip: str, kind: str) -> Ours:
    found = on_one(model, gb, chip, kind)
    (node,) = found.nodes
    return Ours(
        WORDS[found.verdict],
        f"{node.peak_bytes / GIGA:.3g} GB of the {node.limit_bytes / GIGA:.3g} that may be used, "
        f"{resting_bytes(found.spec, trained=False) / GIGA:.3g} for the frozen weights",
    )


def adapters_need(model: str, gb: float, chip: str, kind: str) -> Ours:
    (node,) = on_one(model, gb, chip, kind).nodes
    return Ours(node.peak_bytes / GIGA, f"most of it: {node.ledger.most()}")


def adapter_parameters(model: str, rank: int = 16) -> Ours:
    recipe = variant(scout(), ADAPTERS | {"tuning.rank": rank})
    spec = catalog_target(model, recipe).spec
    layers = len(spec.units) - 1
    return Ours(
        spec.trainable_parameters / 1e6,
        f"rank {rank} x (inputs + outputs) of every linear module of {layers} layers",
    )


def adapter_part(model: str, rank: int = 16) -> Ours:
    recipe = variant(scout(), ADAPTERS | {"tuning.rank": rank})
    spec = catalog_target(model, recipe).spec
    part = 100 * spec.trainable_parameters / spec.base_parameters
    return Ours(
        part, f"{spec.trainable_parameters / 1e6:.1f} M of {spec.base_parameters / 1e9:.2f} B, rank {rank}"
    )


def s2_function(quantised: bool) -> Ours:
    """The sum that S2's appendix defines, with its own arguments: 7 B, rank 16, 50 layers of 4,096, 2,048 tokens."""
    weights, layers, hidden, tokens, item = 7e9, 50, 4096, 2048, 2
    adapters = item * layers * 16 * hidden * 2 * 7
    activations, cache = item * tokens * hidden * layers / 4, 2 * item * tokens * layers * hidden
    parts: tuple[float, ...]
    if quantised:
        parts = (weights / 2, 0.4e9, adapters, adapters, adapters, activations, cache, 1.5e9)
    else:
        parts = (weights * item, adapters, 2 * adapters, adapters, activations, cache, 3e9)
    return Ours(sum(parts) / GIGA, " + ".join(f"{part / GIGA:.2f}" for part in parts))


def steps_of(rows: int, epochs: int, batch: int) -> Ours:
    return Ours(
        float(-(-rows * epochs // batch)), f"{rows} rows x {epochs} epochs / {batch} rows a step, rounded up"
    )


def adapter_run(model: str, chip: str, kind: str, steps: int | None = None) -> Pace:
    """Of a run on one card of the largest memory that it is sold with."""
    return pace_of(on_one(model, max(chip_named(chip).memory), chip, kind, steps), WIRES[0])


def step_seconds(model: str, chip: str, kind: str) -> Ours:
    speed = spell(chip_named(chip).tflops)
    seconds = adapter_run(model, chip, kind).step_seconds
    return Ours(seconds, f"operations of 16 rows of 2,048 at {speed} TFLOP/s, and the weights' reading")


def rented_dollars(model: str, chip: str, kind: str, steps: int) -> Ours:
    low, high = adapter_run(model, chip, kind, steps).run_hours
    rent = chip_named(chip).rent
    assert rent is not None, f"chips.toml says what {chip} costs an hour"
    return Ours(
        (low * rent[0], high * rent[1]), f"{spell((low, high))} h x {spell(rent)} dollars an hour, no set-up"
    )


def own_dollars(model: str, chip: str, kind: str, steps: int) -> Ours:
    node, pace = machine(max(chip_named(chip).memory), chip), adapter_run(model, chip, kind, steps)
    cost, price, watts = run_dollars([node], pace), price_of(node), chip_named(chip).watts
    assert cost is not None, f"chips.toml says what {chip} costs and draws"
    assert price is not None
    assert watts is not None
    return Ours(
        cost,
        f"{spell(pace.run_hours)} h x (wear {hourly_wear(price):.3f} dollars an hour of {price:,} in {YEARS_OF_USE} "
        f"years + {watts / 1000:.2f} kW x {spell(DOLLARS_PER_KWH)})",
    )


def cards(chip: str, count: int) -> Ours:
    return Ours(float(count * max(chip_named(chip).memory)), f"{count} x {max(chip_named(chip).memory)} GB")


def hours_at(tokens: float, rate: list[float]) -> Ours:
    low, high = (tokens / one / 3600 for one in reversed(rate))
    return Ours(
        (low, high), f"{tokens:,.0f} tokens / {spell((rate[0], rate[1]))} a second, as it says itself"
    )


def intention_hours(model: str, chip: str, intention: str) -> Ours:
    """Of the arithmetic; adapters have the rank that stands for all of a document's."""
    meant = INTENTIONS[intention]
    found = on_one(model, max(chip_named(chip).memory), chip, str(meant.settings["tuning.type"]))
    each, speed = flops_per_token(found.spec, found.plan.work), chip_named(chip).tflops
    hours = compute_hours(meant.tokens, each, speed)
    return Ours(hours, f"{each / 1e9:.0f} G operations a token at {spell(speed)} TFLOP/s of one {chip}")


def base_gb(model: str, kind: str) -> Ours:
    found = on_one(model, 1024, "H100", kind)
    size = resting_bytes(found.spec, trained=False)
    count = found.spec.base_parameters
    return Ours(
        size / GIGA,
        f"{count / 1e9:.2f} B parameters at {8 * size / count:.2f} bits, scales and embedding counted",
    )


def compression(bits: float, of: float = 32) -> Ours:
    return Ours(of / bits, f"{of:g} bits / {bits:g} bits")


def sum_of(parts: list[float]) -> Ours:
    return Ours(sum(parts), " + ".join(f"{part:g}" for part in parts))


def full_gb(model: str, techniques: str = "pure") -> Ours:
    found = planned(model, "4K", techniques)
    parts, count = trained_bytes(found), found.spec.base_parameters
    each = " + ".join(f"{name} {size / count:.2f}" for name, size in parts.items())
    return Ours(sum(parts.values()) / GIGA, f"{count / 1e9:.2f} B x ({each}), no activations")


def to_measure(command: str) -> Ours:
    """What no plan can say: the command that measures it on the owner's own machines."""
    return Ours(TO_MEASURE, f"`{command}`")


QUESTIONS: dict[str, Callable[..., Ours]] = {
    function.__name__: function
    for function in (
        installed,
        may_use,
        total,
        left,
        fit_verdict,
        stage,
        per_parameter,
        largest_model,
        rented,
        slower_by_recomputing,
        states_saved,
        adapters_on,
        adapters_need,
        adapter_parameters,
        adapter_part,
        s2_function,
        steps_of,
        step_seconds,
        rented_dollars,
        own_dollars,
        cards,
        hours_at,
        intention_hours,
        base_gb,
        compression,
        sum_of,
        full_gb,
        served,
        models_held,
        least_memory,
        swap,
        to_measure,
    )
}
