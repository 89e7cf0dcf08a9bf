"""How large each rank's share is: in proportion to the memory it has left, equal, or as the recipe lists it."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_empire.errors import UserError


def solve_shares(
    mode: str | Sequence[float], limits: Sequence[int], fixed: Sequence[int]
) -> tuple[float, ...]:
    """Shares of all ranks, summing to 1.

    `limits` and `fixed` are bytes per rank: what the rank may use and what it needs whatever its share. `memory`
    gives share_i ~ limit_i - fixed_i, so that all ranks use the same fraction of what they have left; a rank with
    nothing left gets nothing. If no rank has anything left the shares follow the limits (the ledger then says no).
    """
    if mode == "equal":
        weights: list[float] = [1.0] * len(limits)
    elif mode == "memory":
        weights = [float(max(limit - need, 0)) for limit, need in zip(limits, fixed, strict=True)]
        if not any(weights):
            weights = [float(limit) for limit in limits]
    else:
        assert not isinstance(mode, str)
        weights = [float(w) for w in mode]
        if len(weights) != len(limits):
            raise UserError(
                f"memory.shares: {list(mode)} names {len(weights)} ranks but {len(limits)} run; list one per rank"
            )
        if min(weights) < 0 or not sum(weights) > 0:
            raise UserError(f"memory.shares: {list(mode)}: weights must not be negative, nor all zero")
    total = sum(weights)
    return tuple(w / total for w in weights)
