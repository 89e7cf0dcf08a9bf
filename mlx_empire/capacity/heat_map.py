"""Decides how the matrix looks on the capacity page: a heat map of the models that tell something, the rest folded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from mlx_empire.capacity.charts import SAID, SIGNS, WORDS
from mlx_empire.capacity.matrix import Cell, MatrixRow
from mlx_empire.capacity.survey_document import MatrixSurvey
from mlx_empire.page.render import still_part
from mlx_empire.report.text import billions, room

HERE = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class HeatCell:
    """A model on a cluster: coloured by verdict, the stronger (`depth`, in %) the more room is left; grey where memory
    alone is not the question. `differs`: pooled memory says something else. A phone has place for sign and `figure`
    only, not for what they are in words and the `rest`."""

    colour: str
    depth: str
    differs: bool
    pooled: str
    sign: str
    said: str
    figure: str
    rest: str


@dataclass(frozen=True)
class HeatRow:
    """A model on all clusters; `barred`: why it cannot be trained."""

    model: str
    barred: str | None
    parameters: str
    cells: Sequence[HeatCell]


def matrix_section(survey: MatrixSurvey) -> Markup:
    """Every model against every cluster; a dashed frame where pooled memory would have said otherwise."""
    clusters, found = survey.matrix.clusters, survey.comparison
    telling = [row for row in survey.by_size if _is_telling(row)]
    rest = [row for row in survey.by_size if not _is_telling(row)]
    differences = found.differences if found is not None else ()
    return still_part(
        HERE,
        "matrix",
        **SAID,
        clusters=clusters,
        telling=[_heat(row, clusters) for row in telling],
        rest=[_heat(row, clusters) for row in rest],
        alike=_alike(rest),
        barred=list(dict.fromkeys(row.not_trainable for row in survey.by_size if row.not_trainable)),
        comparison=found,
        differences=[(d.model, d.cluster, d.file_says, d.verdict, d.why) for d in differences],
    )


def _is_telling(row: MatrixRow) -> bool:
    """Whether the clusters differ, or one says something else than pooled memory would. A single cluster has none to
    be the same as, so each of its rows is telling."""
    cells = row.cells.values()
    alone, alike = len(cells) == 1, len({cell.verdict for cell in cells}) == 1
    return alone or not alike or any(cell.pooled_says != cell.verdict for cell in cells)


def _alike(rows: Sequence[MatrixRow]) -> str:
    """How many models fit everywhere, and nowhere."""
    said = {"fits": "fit everywhere", "tight": "are tight everywhere", "no": "fit nowhere"}
    return counted_verdicts((next(iter(row.cells.values())).verdict for row in rows), said)


def counted_verdicts(verdicts: Iterable[str], said: Mapping[str, str]) -> str:
    """How many there are of each verdict, in the words that `said` has for them."""
    counts = dict.fromkeys(WORDS, 0)
    for verdict in verdicts:
        counts[verdict] += 1
    return ", ".join(f"{count} {said[verdict]}" for verdict, count in counts.items() if count)


def _heat(row: MatrixRow, clusters: Sequence[str]) -> HeatRow:
    cells = [_cell(row.cells[name], trainable=row.not_trainable is None) for name in clusters]
    return HeatRow(row.model, row.not_trainable, billions(row.parameters), cells)


def _cell(cell: Cell, *, trainable: bool) -> HeatCell:
    verdict, headroom = cell.verdict, cell.headroom
    depth = 22 if verdict == "no" else 16 + 34 * min(max(headroom, 0.0), 1.0)
    colour, said = (verdict, verdict) if trainable else ("none", f"memory: {verdict}")
    pooled = cell.pooled_says
    figure, _, rest = f"{room(headroom)} · Z{cell.zero_stage}".partition(" ")
    sign, differs = SIGNS[verdict], pooled != verdict
    return HeatCell(colour, f"{depth:.0f}", differs, WORDS[pooled], sign, said, figure, rest)
