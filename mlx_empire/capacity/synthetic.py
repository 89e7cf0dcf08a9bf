"""`capacity --synthetic`: what each intention of synthetic data takes on these machines, beside the document's numbers.

Decides what is reckoned for an intention (`plan.intentions`): the recipe with that tuning and everything else as it is,
in as many full rows as hold the tokens, every position of which is taken for one. Memory is the peak of the machine
with least room; time is the plan's clock, evaluations and saves not counted. Of a plan that does not fit no time is
told but the least that makes it fit. Where ours is another number than the document's, a sentence says from what.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from mlx_empire.capacity.advice import advise
from mlx_empire.capacity.document import Document
from mlx_empire.capacity.text import plain_table, verdict_text
from mlx_empire.capacity.whatif import Advice, fits, fullest_node
from mlx_empire.cluster.hostfile import Node
from mlx_empire.cluster.machine import Calibration
from mlx_empire.errors import UserError
from mlx_empire.model.spec import ModelSpec
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.agreement import agreement
from mlx_empire.plan.assess import Assessment, assess
from mlx_empire.plan.chips import GIGA, Chip, Range, no_time
from mlx_empire.plan.hardware import Wire
from mlx_empire.plan.intentions import INTENTIONS, Intention, steps_of_tokens, tflops_asked
from mlx_empire.plan.pace import chips_of, pace_of, spell
from mlx_empire.plan.resolve import never_fits
from mlx_empire.plan.work import flops_per_token
from mlx_empire.recipe.changes import typed, variant
from mlx_empire.recipe.duration import Duration
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.text import run_length

SpecOf = Callable[[Recipe], ModelSpec]
PACKED = {"tuning.type": "qlora", "tuning.bits": 4}


@dataclass(frozen=True)
class Budget:
    """What one intention takes. `steps`: for the fewer and the more tokens. `hours`: of the run, None where it does not
    fit or a chip is not known. `tflops`: of all machines, None where not known; `bound`: what holds a step back.
    `least`: what makes it fit where it does not."""

    name: str
    meant: Intention
    plan: Assessment
    steps: tuple[int, int]
    hours: Range | None
    tflops: Range | None
    bound: str | None
    least: Advice | None

    @property
    def gigabytes(self) -> float:
        """Peak of the machine with least room, in 10^9 bytes."""
        return self.plan.worst.peak_bytes / GIGA

    @property
    def operations(self) -> float:
        """Executed per token."""
        return flops_per_token(self.plan.spec, self.plan.plan.work)

    @property
    def time_verdict(self) -> str | None:
        """Of our hours beside the document's; None where we tell none."""
        return None if self.hours is None else agreement(self.meant.hours, self.hours)

    @property
    def memory_verdict(self) -> str:
        """Of our peak beside the document's memory of one GPU."""
        return agreement(self.meant.gigabytes, (self.gigabytes, self.gigabytes))

    @property
    def why(self) -> str:
        """One sentence on what makes our numbers others than the document's; empty where both agree."""
        parts = []
        if self.hours is not None and self.tflops is not None and self.time_verdict != "agrees":
            asked = tflops_asked(self.meant.tokens, self.operations, self.meant.hours)
            each = spell((self.operations / 1e9, self.operations / 1e9))
            sum_of_it = f"{_tokens(self.meant.tokens)} x {each} G / {spell(self.meant.hours)}"
            done = tflops_asked(self.meant.tokens, self.operations, self.hours)
            parts.append(
                f"tokens x operations a token / time, {sum_of_it} hours, asks for {spell(asked)} TFLOP/s with this "
                f"model, and the clock has these machines do {spell(done)} (chips.toml: {spell(self.tflops)}; most of "
                f"a step: {self.bound})"
            )
        if self.memory_verdict != "agrees":
            worst = self.plan.worst
            parts.append(f"most of the {self.gigabytes:,.3g} GB on {worst.node.name}: {worst.ledger.most()}")
        return (
            f"the document leaves the model open and reckons for one GPU: {'; '.join(parts)}" if parts else ""
        )


@dataclass(frozen=True)
class SyntheticSurvey:
    """The budgets of a model, those that cannot be planned with the reason, and why there are no times, if so."""

    model: str
    budgets: Sequence[Budget]
    impossible: Sequence[tuple[str, str]]
    positions: int
    not_trainable: str | None
    no_time: str | None


def synthetic(
    recipe: Recipe,
    spec_of: SpecOf,
    nodes: Sequence[Node],
    wire: Wire,
    calibration: Calibration | None = None,
    not_trainable: str | None = None,
) -> SyntheticSurvey:
    """Every intention for the recipe's model on `nodes`. `spec_of`: the model as a changed recipe tunes it. UserError
    where the recipe itself cannot be planned."""
    unknown = no_time(nodes, calibration)
    name = spec_of(recipe).name
    found: list[Budget] = []
    impossible: list[tuple[str, str]] = []
    for key, meant in INTENTIONS.items():
        try:
            tuned = variant(recipe, meant.settings)
            plan = assess(tuned, spec_of(tuned), nodes, state_bytes_of)
            chips = None if unknown else chips_of(plan, None, calibration)
            found.append(budget(key, meant, plan, wire, chips, spec_of))
        except UserError as error:
            impossible.append((key, str(error)))
    positions = recipe.batch.global_size * recipe.data.sequence_length
    return SyntheticSurvey(name, found, impossible, positions, not_trainable, unknown)


def budget(
    name: str, meant: Intention, plan: Assessment, wire: Wire, chips: Sequence[Chip] | None, spec_of: SpecOf
) -> Budget:
    """What the intention takes with this plan. `chips`: of the machines, None where one is not known."""
    batch, length = plan.recipe.batch.global_size, plan.recipe.data.sequence_length
    fewer, more = (steps_of_tokens(tokens, batch * length) for tokens in meant.tokens)
    if not fits(plan):
        return Budget(name, meant, plan, (fewer, more), None, None, None, least(plan, wire, spec_of))
    if chips is None:
        return Budget(name, meant, plan, (fewer, more), None, None, None, None)
    short, long = (
        pace_of(replace(plan, recipe=variant(plan.recipe, {"run.steps": Duration(steps)})), wire, chips)
        for steps in (fewer, more)
    )
    tflops = sum(chip.tflops[0] for chip in chips), sum(chip.tflops[1] for chip in chips)
    hours = short.run_hours[0], long.run_hours[1]
    return Budget(name, meant, plan, (fewer, more), hours, tflops, short.bound, None)


def least(plan: Assessment, wire: Wire, spec_of: SpecOf) -> Advice | None:
    """The cheapest change that makes it fit: settings, for adapters a packed base, else machines, memory or a rent."""
    first = next(iter(advise(plan, wire)), None)
    if plan.recipe.tuning.type == "full" or (first is not None and first.is_settings):
        return first
    nodes, packed = [one.node for one in plan.nodes], variant(plan.recipe, PACKED)
    spec = spec_of(packed)
    if not never_fits(spec, nodes, state_bytes_of(packed.optimizer)):
        other = assess(packed, spec, nodes, state_bytes_of)
        if fits(other):
            return Advice(typed(PACKED), fullest_node(other), other.verdict)
    return first


def synthetic_document(survey: SyntheticSurvey) -> Document:
    """The survey as JSON: sizes in bytes, the document's in 10^9; pairs are [low, high]."""
    return {
        "model": survey.model,
        "positions_per_step": survey.positions,
        "not_trainable": survey.not_trainable,
        "no_time": survey.no_time,
        "intentions": [_budget_document(one) for one in survey.budgets],
        "impossible": [{"intention": name, "why": why} for name, why in survey.impossible],
    }


def _budget_document(one: Budget) -> Document:
    tuning, worst = one.plan.recipe.tuning, one.plan.worst
    return {
        "intention": one.name,
        "tuning": tuning.type,
        "rank": tuning.rank,
        "tokens": list(one.meant.tokens),
        "steps": list(one.steps),
        "verdict": one.plan.verdict,
        "zero_stage": one.plan.zero_stage,
        "worst_node": worst.node.name,
        "nodes": [
            {"name": node.node.name, "peak_bytes": node.peak_bytes, "limit_bytes": node.limit_bytes}
            for node in one.plan.nodes
        ],
        "least": None if one.least is None else {"change": one.least.change, "effect": one.least.effect},
        "days": None if one.hours is None else [hours / 24 for hours in one.hours],
        "operations_per_token": one.operations,
        "document": {
            "hours": list(one.meant.hours),
            "gigabytes": list(one.meant.gigabytes),
            "time_verdict": one.time_verdict,
            "memory_verdict": one.memory_verdict,
        },
        "why": one.why,
    }


def print_synthetic(survey: SyntheticSurvey, console: Console) -> None:
    """What each intention takes here, the document's numbers beside it, and the sentences."""
    table = plain_table(f"synthetic data for {survey.model}, {survey.positions:,} positions a step")
    for title in ("intention", "trained", "tokens", "steps", "fullest machine", "", "run"):
        table.add_column(title, overflow="fold")
    beside = plain_table("beside the document's numbers, which are of one GPU (GB: 10^9 bytes)")
    for title in ("intention", "it says", "here", "", "it says", "here", ""):
        beside.add_column(title, overflow="fold")
    for one in survey.budgets:
        worst = one.plan.worst
        run = "-" if one.plan.verdict == "no" else "?" if one.hours is None else run_length(one.hours)
        memory = f"{one.gigabytes:,.3g} GB"
        table.add_row(
            one.name,
            one.meant.trained,
            _tokens(one.meant.tokens),
            " to ".join(f"{steps:,}" for steps in dict.fromkeys(one.steps)),
            f"{escape(worst.node.name)}: {memory} of {worst.limit_bytes / GIGA:,.3g}",
            verdict_text(one.plan.verdict),
            run,
        )
        said = run_length(one.meant.hours), run, one.time_verdict or "-"
        beside.add_row(one.name, *said, f"{spell(one.meant.gigabytes)} GB", memory, one.memory_verdict)
    console.print(table)
    console.print()
    console.print(beside)
    for one in survey.budgets:
        if one.least is not None:
            console.print(Text(f"{one.name} fits with {one.least.change}: {one.least.effect}", "bold"))
    for name, why in (*((one.name, one.why) for one in survey.budgets), *survey.impossible):
        if why:
            console.print(Text(f"{name}: {why}", "dim"))
    for note in (survey.not_trainable, survey.no_time):
        if note:
            console.print(Text(note, "bold"))


def _tokens(tokens: Range) -> str:
    """`100 M`, `10 to 20 B`."""
    scale, unit = (1e9, " B") if tokens[0] >= 1e9 else (1e6, " M")
    return " to ".join(dict.fromkeys(f"{count / scale:g}" for count in tokens)) + unit
