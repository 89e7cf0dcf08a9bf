"""What things in a run's folder are called, where runs lie if nobody says, and the one way `plan.json` is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RUNS = Path("runs")  # where the recipes that come with this put theirs
RECIPE, PLAN, FINAL = "recipe.yaml", "plan.json", "final"
CURRENT = "current"  # in a daughter's folder: a link to the final/ of the generation that is in use


def plan_of(folder: Path) -> dict[str, Any]:
    """What `plan.json` in a run's folder says; empty where there is none that can be read."""
    try:
        found = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
