"""When a number computed here agrees with one that somebody wrote down: the words of a verdict.

Numbers agree within 15 % or where their ranges meet, are near within 35 %, and differ beyond.
"""

from __future__ import annotations

from mlx_empire.plan.chips import Range

AGREES, NEAR = 1.15, 1.35  # times


def agreement(theirs: Range, ours: Range) -> str:
    """`agrees`; or `near: 1.2 x`, `differs: 3 x`: how many times theirs ours is, from the nearer ends of both.

    No ratio is told where one of the numbers is not above 0.
    """
    (low, high), (least, most) = theirs, ours
    if least <= high and low <= most:
        return "agrees"
    if min(high, most) <= 0:
        return "differs"
    far, times = (least / high, least / high) if least > high else (low / most, most / low)
    word = "agrees" if far <= AGREES else "near" if far <= NEAR else "differs"
    return word if word == "agrees" else f"{word}: {times:.3g} x"
