"""The model card of a result: what it is, how it was made, what it scores, and where it comes from.

Markdown with the YAML head that Hugging Face reads. Everything stands in the run's own folder; nothing is looked up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_empire import __version__
from mlx_empire.formats.base_layout import bitnet_family
from mlx_empire.model.mlx_lm_modules import OURS
from mlx_empire.model.packing_config import BITNET_NAME
from mlx_empire.model.spec import ModelSpec
from mlx_empire.recipe.evaluation import worse_by
from mlx_empire.recipe.load import dump_recipe
from mlx_empire.recipe.schema import Recipe

MOST_WORSE = 10  # scores that are named because they got worse
KINDS = {
    "full": "full fine-tuning",
    "parts": "fine-tuning of parts, the rest unchanged,",
    "lora": "LoRA",
    "dora": "DoRA",
    "qlora": "QLoRA",
}


def model_card(
    recipe: Recipe,
    spec: ModelSpec,
    metrics: Sequence[Mapping[str, Any]],
    data_digest: str,
    base_digest: str | None,
    source: str | None = None,
    start: Mapping[str, Any] | None = None,
) -> str:
    """The text of README.md from a run's recipe, model and records (metrics.jsonl).

    `base_digest` of a frozen base; `source`: owner/name@revision on the Hub, where it is known; `start`: what plan.json
    says of an earlier adapter that it began from.
    """
    sections = [
        _head(recipe, source),
        f"# {recipe.run.dir.name}\n\n{_kind(recipe)} of `{recipe.model.path}`, by mlx_empire {__version__}.",
        f"## Use\n\n{_use(recipe, spec.family)}",
        f"## Figures\n\n{_figures(spec, metrics)}",
        *([] if not (worse := _worse(metrics)) else [f"## What got worse\n\n{worse}"]),
        f"## Lineage\n\n{_lineage(recipe, data_digest, base_digest, source)}",
        *([] if start is None else [f"## Begun from\n\n{_began(recipe, metrics, start)}"]),
        f"## Recipe\n\n```yaml\n{dump_recipe(recipe)}```",
    ]
    return "\n\n".join(sections) + "\n"


def _kind(recipe: Recipe) -> str:
    ternary = " with ternary weights (quantisation-aware training)" if recipe.tuning.qat else ""
    return KINDS["parts" if recipe.tuning.of_parts else recipe.tuning.type] + ternary


def _head(recipe: Recipe, source: str | None) -> str:
    full = recipe.tuning.type == "full"
    library = "library_name: mlx" if full else "library_name: peft"
    relation = "finetune" if full else "adapter"
    tags = "\n".join(f"- {tag}" for tag in ("mlx", "mlx-empire", *(() if full else ("lora",))))
    base = recipe.model.path if source is None else source.partition("@")[0]
    return f"---\nbase_model: {base}\nbase_model_relation: {relation}\n{library}\ntags:\n{tags}\n---"


def _use(recipe: Recipe, family: str) -> str:
    base, bits = recipe.model.path, recipe.tuning.bits
    if (packed := bitnet_family(base)) is not None:
        merge = "" if packed == BITNET_NAME else ": `mlx-empire export merge` makes a whole model of it"
        return f"mlx-lm puts no adapters into BitNet's modules{merge}."
    full, ours = recipe.tuning.type == "full", family in OURS
    beside = "" if full else f" --model {base}" if ours else " --adapter-path THIS_FOLDER"
    model = "THIS_FOLDER" if full else base
    ask = (
        f"mlx-empire chat THIS_FOLDER{beside}"
        if ours
        else f"mlx_lm.generate --model {model}{beside} --prompt ..."
    )
    lines = [f"```\n{ask}\n```"]
    if full:
        return lines[0]
    if recipe.tuning.type == "qlora":
        lines.append(
            f"It was trained on `{base}` packed as `{bits or 4}`, and belongs to those values: "
            f"`mlx-empire export base {base} OUT --bits {bits or 4}` writes them; name OUT as the model."
        )
    lines.append("The sub-folder `peft`, where there is one, holds the same adapter for `peft` on torch.")
    return "\n\n".join(lines)


def _figures(spec: ModelSpec, metrics: Sequence[Mapping[str, Any]]) -> str:
    steps = [r for r in metrics if "loss" in r]
    evaluations = [r for r in metrics if "eval_loss" in r]
    rows = [
        ("parameters", f"{spec.parameters:,}"),
        ("of them trained", f"{spec.trainable_parameters:,}"),
        ("steps", str(steps[-1]["step"]) if steps else "0"),
        ("targets learnt from", f"{sum(r['tokens'] for r in steps):,}"),
    ]
    if steps and steps[-1]["loss"] is not None:
        rows.append(("training loss, first and last step", f"{_number(steps[0])}, {_number(steps[-1])}"))
    for record in evaluations[:1] + evaluations[1:][-1:]:
        found = {"loss": record["eval_loss"], **record.get("scores", {})}
        text = ", ".join(f"{k} {v:.4f}" for k, v in found.items() if isinstance(v, float))
        rows.append((f"held out, after {record['step']} steps", text))
    return "| | |\n|---|---|\n" + "\n".join(f"| {a} | {b} |" for a, b in rows)


def _worse(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The scores that are worse than before the first step, the worst first; empty where none is."""
    scores = [r.get("scores", {}) for r in metrics if "eval_loss" in r]
    if len(scores) < 2:
        return ""
    pairs = {name: (scores[0][name], after) for name, after in scores[-1].items() if name in scores[0]}
    lost = {n: by for n, (a, b) in pairs.items() if None not in (a, b) and (by := worse_by(n, a, b)) > 0}
    lines = [
        f"| {name} | {pairs[name][0]:.4f} | {pairs[name][1]:.4f} |"
        for name in sorted(lost, key=lambda name: -lost[name])[:MOST_WORSE]
    ]
    return "\n".join(["| score | before the first step | now |", "|---|---|---|", *lines]) if lines else ""


def _began(recipe: Recipe, metrics: Sequence[Mapping[str, Any]], start: Mapping[str, Any]) -> str:
    own = sum("loss" in r for r in metrics) * recipe.batch.global_size
    seen, older = start["rows_seen"], start["before"]
    before = "not known how many" if seen is None else f"{seen:,}"
    rows = [
        ("adapter", f"`{start['path']}`"),
        ("its digest", f"`{start['digest']}`"),
        *([("before it", "<br>".join(f"`{digest}`" for digest in older))] if older else []),
        ("rows seen before", before),
        ("rows seen", f"{own:,} more" if seen is None else f"{seen + own:,}"),
    ]
    return "| | |\n|---|---|\n" + "\n".join(f"| {a} | {b} |" for a, b in rows)


def _number(record: Mapping[str, Any]) -> str:
    loss = record["loss"]
    return "not finite" if loss is None else f"{loss:.4f}"


def _lineage(recipe: Recipe, data_digest: str, base_digest: str | None, source: str | None) -> str:
    rows = [
        ("base", f"`{recipe.model.path}`"),
        *([] if source is None else [("fetched from", f"`{source}`")]),
        ("digest of the base", f"`{base_digest}`" if base_digest else "not frozen, so it has none"),
        *_teacher(recipe),
        *[("data", f"`{path}`{mixed}") for path, mixed in _sources(recipe)],
        ("digest of the data", f"`{data_digest}`"),
        ("seed", str(recipe.run.seed)),
        ("written by", f"mlx_empire {__version__}"),
    ]
    return "| | |\n|---|---|\n" + "\n".join(f"| {a} | {b} |" for a, b in rows)


def _teacher(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Whose likeliest tokens were learnt beside the data's."""
    asked = recipe.distillation
    if asked.teacher is not None:
        how = f"weight {asked.weight:g}, temperature {asked.temperature:g}, {asked.top} tokens"
        yield "teacher", f"`{asked.teacher}`, {how}"


def _sources(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """Where the data lay, and how it was mixed."""
    if recipe.data.path is not None:
        yield recipe.data.path, ""
    for one in recipe.data.sources:
        yield (
            one.path,
            f", weight {one.weight:g}" + ("" if one.whole else f" from {one.start:g} to {one.end:g}"),
        )
