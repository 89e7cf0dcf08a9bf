"""What the plan says of a setting, in whole numbers and without any rank: traffic and ledgers."""

from __future__ import annotations

from typing import Any

from support.stepping import Case, config_of, optimizer_of
from support.tuning import TunedCase, built_of

from mlx_empire.model.build import build_model, describe
from mlx_empire.model.spec import ModelSpec
from mlx_empire.optim.adamw import AdamW
from mlx_empire.plan.memory import Ledger, StateBytes, ledger
from mlx_empire.plan.shards import ShardPlan, make_plan
from mlx_empire.plan.step_traffic import step_traffic
from mlx_empire.plan.workload import Workload, cell_layout


def case_of(fields: dict[str, Any], ranks: int) -> Case:
    """The case of a setting on so many ranks."""
    kind = TunedCase if "tuning" in fields else Case
    return kind(**{**fields, "shares": tuple(fields["shares"][:ranks])})


def planned(case: Case, ranks: int) -> tuple[ModelSpec, ShardPlan, Workload, StateBytes]:
    """Model, plan, step and the optimizer's answer of a case."""
    if isinstance(case, TunedCase):
        spec, state_bytes = built_of(case).spec, AdamW(state_bits=case.state_bits).state_bytes
    else:
        config = config_of(case)
        spec = describe(build_model(config, case.family), config, case.family, case.dtype)
        state_bytes = optimizer_of(case).state_bytes
    shares = [case.shares[r % len(case.shares)] for r in range(ranks)]
    layout = cell_layout(case.micro_batches * case.rows, case.rows, case.cells, ranks)
    release = False if isinstance(case, TunedCase) else case.release
    work = Workload(case.rows, case.width, layout, case.tail, case.gradient_dtype, case.route, 8192, release)
    return spec, make_plan(spec.units, shares, case.stage), work, state_bytes


def plan_of(case: Case, ranks: int) -> dict[str, Any]:
    """Bytes from each rank to each other one, and each rank's peak with what it is made of."""
    spec, plan, work, state_bytes = planned(case, ranks)
    ledgers = [ledger(spec, plan, work, r, state_bytes) for r in range(ranks)]
    return {"traffic": step_traffic(plan, work), "ledgers": [summary(one) for one in ledgers]}


def summary(one: Ledger) -> dict[str, Any]:
    """A ledger's peak, the phase that sets it, every phase's sum and what makes up the peak."""
    phases = {name: sum(items.values()) for name, items in one.phases.items()}
    items = {name: size for name, size in one.items().items() if size}
    return {"peak": one.peak, "phase": one.largest_phase, "phases": phases, "items": items}
