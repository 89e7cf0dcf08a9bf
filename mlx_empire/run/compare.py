"""How runs differ: the keys of their recipes, then what came of each at the same steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mlx_empire.recipe.changes import changes
from mlx_empire.recipe.load import written
from mlx_empire.report.text import duration, number
from mlx_empire.run.overview import RECENT, Overview
from mlx_empire.sizes import amount

WHERE = ("run.dir", "run.checkpoints")  # they differ in any two runs, and mean nothing
AT_MOST = 8  # steps at which curves are compared


def differences(runs: Sequence[Overview]) -> Iterator[list[str]]:
    """Rows of a key and its value in each run; `?` for a run whose recipe cannot be read."""
    known = [run.recipe for run in runs if run.recipe is not None]
    keys = {key: None for one in known for other in known for key in changes(one, other) if key not in WHERE}
    for key in keys:
        section, name = key.split(".")
        yield [
            key,
            *("?" if r.recipe is None else written(getattr(getattr(r.recipe, section), name)) for r in runs),
        ]


def figures(runs: Sequence[Overview], *, curves: bool = True) -> Iterator[list[str]]:
    """Rows of a figure's name and its value for each run; `curves`: with losses at steps that all have."""
    yield ["state", *(run.condition for run in runs)]
    yield ["steps", *(run.progress for run in runs)]
    yield ["parameters trained", *(_count(run.plan.get("trainable_parameters")) for run in runs)]
    yield ["data", *_same(runs)]
    if curves:
        yield from _at_common_steps(runs)
    yield ["best held-out loss", *(_best(run) for run in runs)]
    for name in dict.fromkeys(name for run in runs for name in _scores(run)):
        yield [f"{name}, last", *(number(_scores(run).get(name), ".4f") for run in runs)]
    yield ["seconds a step", *("-" if run.pace is None else f"{run.pace:.3g}" for run in runs)]
    yield ["in all", *(duration(sum(float(r["step_seconds"]) for r in run.steps)) for run in runs)]
    yield ["targets learnt", *(f"{sum(int(r['tokens']) for r in run.steps):,}" for run in runs)]
    yield ["largest peak of a rank", *(_peak(run) for run in runs)]


def _at_common_steps(runs: Sequence[Overview]) -> Iterator[list[str]]:
    for step in _common([{r["step"] for r in run.steps} for run in runs]):
        yield [f"loss, mean of {RECENT} to step {step:,}", *(_mean(run, step) for run in runs)]
    for step in _common([{r["step"] for r in run.evaluations} for run in runs]):
        yield [f"held-out loss after step {step:,}", *(_held_out(run, step) for run in runs)]


def _common(steps: Sequence[set[int]]) -> list[int]:
    """Steps that all have, at most AT_MOST of them, evenly spaced and with the last."""
    shared = sorted(set.intersection(*steps))
    if len(shared) <= AT_MOST:
        return shared
    return [shared[(i + 1) * len(shared) // AT_MOST - 1] for i in range(AT_MOST)]


def _mean(run: Overview, step: int) -> str:
    """The mean loss of the last steps up to one: that of a single step says little."""
    before = [r["loss"] for r in run.steps if r["step"] <= step][-RECENT:]
    finite = [loss for loss in before if loss is not None]
    return f"{sum(finite) / len(finite):.4f}" if finite else "nan"


def _held_out(run: Overview, step: int) -> str:
    return next(f"{r['eval_loss']:.4f}" for r in reversed(run.evaluations) if r["step"] == step)


def _best(run: Overview) -> str:
    if not run.evaluations:
        return "-"
    best = min(run.evaluations, key=lambda record: float(record["eval_loss"]))
    return f"{best['eval_loss']:.4f} after step {best['step']:,}"


def _scores(run: Overview) -> dict[str, Any]:
    """The scores of the last evaluation that has some."""
    return next((dict(r["scores"]) for r in reversed(run.records) if r.get("scores")), {})


def _same(runs: Sequence[Overview]) -> list[str]:
    """Letters: runs with the same letter learnt from the same rows; `?` where nobody wrote that down."""
    digests = [run.plan.get("data_digest") for run in runs]
    letters = {digest: chr(ord("A") + i) for i, digest in enumerate(dict.fromkeys(d for d in digests if d))}
    return [letters.get(digest, "?") for digest in digests]


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "?"


def _peak(run: Overview) -> str:
    peaks = [max(r["peak_bytes"]) for r in run.steps if r.get("peak_bytes")]
    return amount(max(peaks)) if peaks else "?"
