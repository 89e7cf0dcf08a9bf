"""Every model of the catalog against a few clusters, and where somebody else's matrix says something different.

Decides what the *pooled* arithmetic is, that most people do in their heads: the memory of all machines added up
against 7 bytes per parameter (`fits`) or 5 (`tight`). It forgets three things: macOS lets the GPU use 81-91 % of the
memory, each machine needs more than its share of the states, and the fullest machine decides, not the sum.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlx_empire.cluster.hostfile import Node
from mlx_empire.errors import UserError
from mlx_empire.model import catalog
from mlx_empire.model.closed_forms import active_parameters
from mlx_empire.model.spec import ModelSpec
from mlx_empire.plan.assess import Assessment, assess
from mlx_empire.plan.hardware import standard_clusters
from mlx_empire.plan.optimizer_bytes import StatesOf
from mlx_empire.plan.work import trained_bytes
from mlx_empire.recipe.schema import Recipe

POOLED_FITS, POOLED_TIGHT = 7, 5  # bytes per parameter
WORDS = {"YES": "fits", "TIGHT": "tight", "NO": "no", "FITS": "fits"}
MOST_ROWS = 10_000


@dataclass(frozen=True)
class Cell:
    """One model on one cluster. `headroom`: what is left on the worst node, as a fraction of its limit (negative: too
    little). `beside_bytes`: what that node needs beside its share of weights, gradients and states. `pooled_says`: what
    adding up all memory would have said. `reason`: of the worst node, when not `fits`."""

    verdict: str
    zero_stage: int
    headroom: float
    pooled_says: str
    worst: str
    peak_bytes: int
    limit_bytes: int
    beside_bytes: int
    bytes_per_parameter: float
    reason: str

    @property
    def headroom_bytes(self) -> int:
        """What is left on the worst node."""
        return self.limit_bytes - self.peak_bytes


@dataclass(frozen=True)
class MatrixRow:
    """A catalog model on all clusters; `not_trainable` says why the trainer cannot do it, whatever its memory."""

    model: str
    parameters: int
    active_parameters: int
    not_trainable: str | None
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class Matrix:
    """Verdicts by model and cluster. Bytes of each cluster: all that is installed, and what its GPUs may use of it."""

    clusters: tuple[str, ...]
    pooled_bytes: Mapping[str, int]
    usable_bytes: Mapping[str, int]
    rows: tuple[MatrixRow, ...]


@dataclass(frozen=True)
class Difference:
    """A cell of somebody's file that says something else, and why in one sentence. `file_says` as written there."""

    model: str
    cluster: str
    file_says: str
    verdict: str
    why: str


@dataclass(frozen=True)
class FileRow:
    """One row of a file to compare with: the model's name as written, and a word per cluster."""

    model: str
    says: Mapping[str, str]


@dataclass(frozen=True)
class Comparison:
    """`same` counts cells that agree; `unknown` lists the file's models that the catalog does not have."""

    differences: tuple[Difference, ...]
    same: int
    unknown: tuple[str, ...]


def matrix(
    recipe: Recipe,
    models: Iterable[tuple[ModelSpec, str | None]],
    states_of: StatesOf,
    clusters: Mapping[str, Sequence[Node]] | None = None,
) -> Matrix:
    """`recipe` with each of `models` in the place of its own, on each cluster (None: the four of the empire).

    `models`: each described as the recipe tunes it, and why it cannot be trained here, or None.
    """
    chosen = standard_clusters() if clusters is None else clusters
    rows = [_row(spec, why, recipe, chosen, states_of) for spec, why in models]
    pooled = {name: sum(n.memory_bytes for n in nodes) for name, nodes in chosen.items()}
    usable = {name: sum(n.limit_bytes for n in nodes) for name, nodes in chosen.items()}
    return Matrix(tuple(chosen), pooled, usable, tuple(rows))


def pooled_says(parameters: int, nodes: Iterable[Node]) -> str:
    """The verdict of the pooled arithmetic."""
    memory = sum(n.memory_bytes for n in nodes)
    if POOLED_FITS * parameters <= memory:
        return "fits"
    return "tight" if POOLED_TIGHT * parameters <= memory else "no"


def _row(
    spec: ModelSpec,
    not_trainable: str | None,
    recipe: Recipe,
    clusters: Mapping[str, Sequence[Node]],
    states_of: StatesOf,
) -> MatrixRow:
    cells = {}
    for cluster, nodes in clusters.items():
        found = assess(recipe, spec, nodes, states_of)
        cells[cluster] = _cell(found, pooled_says(spec.base_parameters, nodes))
    return MatrixRow(spec.name, spec.base_parameters, active_parameters(spec), not_trainable, cells)


def _cell(found: Assessment, pooled: str) -> Cell:
    worst = found.worst
    whole = sum(trained_bytes(found).values())
    return Cell(
        found.verdict,
        found.zero_stage,
        worst.headroom_bytes / max(worst.limit_bytes, 1),
        pooled,
        worst.node.name,
        worst.peak_bytes,
        worst.limit_bytes,
        max(worst.peak_bytes - int(worst.share * whole), 0),
        whole / found.spec.base_parameters,
        worst.reason,
    )


# ---- somebody else's matrix


def read_rows(text: str, source: str) -> list[FileRow]:
    """Rows of a CSV file: a column `model`, and a column of YES, TIGHT or NO per cluster. UserError."""
    reader = csv.DictReader(io.StringIO(text.removeprefix("\ufeff")))
    columns = [c for c in reader.fieldnames or [] if c not in ("model", "parameters")]
    if "model" not in (reader.fieldnames or []) or not columns:
        raise UserError(f"{source}:1: needs a column `model` and one per cluster, such as model,1K+3S,4K")
    rows: list[FileRow] = []
    try:
        for raw in reader:
            if len(rows) == MOST_ROWS:
                raise UserError(f"{source}: more than {MOST_ROWS} rows; this is no matrix of models")
            says = {c: (raw[c] or "").strip().upper() for c in columns}
            for column, word in says.items():
                if word and word not in WORDS:
                    where = f"{source}:{reader.line_num}: {column}"
                    raise UserError(f"{where}: {word[:20]!r} is none of YES, TIGHT, NO; mend that cell")
            rows.append(FileRow((raw["model"] or "").strip(), says))
    except csv.Error as error:
        raise UserError(f"{source}:{reader.line_num}: not a CSV file ({error})") from None
    return rows


def catalog_name(written: str, names: Sequence[str] | None = None) -> str | None:
    """The catalog name that a person means by `Llama 4 Scout (109B MoE)`, or None.

    Letters, digits and dots are compared; the same, or the one the beginning of the other (the newest version then).
    """
    wanted = _plain(re.sub(r"\bmoe\b", "", written, flags=re.IGNORECASE))
    short = _plain(re.sub(r"\(.*?\)", "", written))
    known = {_plain(name): name for name in names or catalog.names()}
    if not short:
        return None
    if wanted in known or short in known:
        return known.get(wanted) or known[short]
    begins = sorted(plain for plain in known if plain.startswith(short) or short.startswith(plain))
    return known[begins[-1]] if begins else None


def compare(found: Matrix, rows: Sequence[FileRow]) -> Comparison:
    """Where the file's words and the matrix's verdicts differ. Clusters that only one of them has are left out."""
    by_name = {row.model: row for row in found.rows}
    differences: list[Difference] = []
    unknown: list[str] = []
    same = 0
    for file_row in rows:
        name = catalog_name(file_row.model, list(by_name))
        if name is None:
            unknown.append(file_row.model)
            continue
        row = by_name[name]
        for cluster in found.clusters:
            said = file_row.says.get(cluster, "")
            cell = row.cells[cluster]
            if not said:
                continue
            if WORDS[said] == (cell.verdict if row.not_trainable is None else "no"):
                same += 1
                continue
            verdict = cell.verdict if row.not_trainable is None else "not trainable"
            why = _why(row, cell, WORDS[said], found.pooled_bytes[cluster], found.usable_bytes[cluster])
            differences.append(Difference(name, cluster, said, verdict, why))
    return Comparison(tuple(differences), same, tuple(unknown))


def _why(row: MatrixRow, cell: Cell, said: str, pooled: int, usable: int) -> str:
    """One sentence: what the sum overlooks, or what it did not know."""
    room = f"{cell.worst} needs {_gb(cell.peak_bytes)} of the {_gb(cell.limit_bytes)} GB that its GPU may use"
    size = cell.bytes_per_parameter * row.parameters
    whole = f"{_gb(size)} GB at {cell.bytes_per_parameter:.1f} bytes per parameter"
    if row.not_trainable is not None:
        memory = {"fits": "its memory would do", "tight": "its memory would just do", "no": f"and {room}"}
        return f"{row.not_trainable}; {memory[cell.verdict]}"
    if cell.verdict == "no" and size >= usable:
        return f"{whole} are more than the {_gb(usable)} GB that the GPUs may use of {_gb(pooled)} installed"
    if cell.verdict == "no":
        beside = f"every machine needs about {_gb(cell.beside_bytes)} GB beside its share of them"
        return f"{whole} would go into the {_gb(usable)} GB that the GPUs may use, but {beside}, so {room}"
    if said == "no":
        divided = f"divided by each machine's free memory (ZeRO-{cell.zero_stage})"
        return f"it fits: {divided}, {whole} leave {100 * cell.headroom:.0f} % on the fullest machine"
    if cell.verdict == "tight":
        return f"it fits, but {100 * cell.headroom:.1f} % left is less than the 5 % of a careful plan: {room}"
    return f"it fits with {100 * cell.headroom:.0f} % left: {room}"


def _gb(size: float) -> str:
    """Bytes in units of 10^9, as machines are sold, in three digits or fewer."""
    return f"{size / 1e9:,.0f}" if abs(size) >= 10e9 else f"{size / 1e9:.2g}"


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.lower())
