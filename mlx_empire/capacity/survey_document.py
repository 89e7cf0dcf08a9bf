"""What `capacity --matrix` and `--ladder` found, as documents: models on clusters, and what each technique saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from mlx_empire.capacity.document import Document
from mlx_empire.capacity.ladder import Rung
from mlx_empire.capacity.matrix import Comparison, Matrix, MatrixRow


@dataclass(frozen=True)
class MatrixSurvey:
    """Every model of the catalog on every cluster, and what somebody's file says instead, if there is one."""

    matrix: Matrix
    comparison: Comparison | None = None

    @property
    def by_size(self) -> list[MatrixRow]:
        """The matrix's rows, small models first."""
        return sorted(self.matrix.rows, key=lambda row: row.parameters)


@dataclass(frozen=True)
class LadderSurvey:
    """One model under one technique after the other."""

    model: str
    rungs: Sequence[Rung]


def matrix_document(survey: MatrixSurvey) -> Document:
    """The matrix as JSON; `headroom` is a fraction of the worst node's limit."""
    matrix, comparison = survey.matrix, survey.comparison
    document: Document = {
        "clusters": list(matrix.clusters),
        "pooled_bytes": dict(matrix.pooled_bytes),
        "rows": [
            {
                "model": row.model,
                "parameters": row.parameters,
                "active_parameters": row.active_parameters,
                "not_trainable": row.not_trainable,
                "cells": {
                    name: {
                        "verdict": cell.verdict,
                        "zero_stage": cell.zero_stage,
                        "headroom": cell.headroom,
                        "headroom_bytes": cell.headroom_bytes,
                        "pooled_says": cell.pooled_says,
                        "worst_node": cell.worst,
                        "reason": cell.reason,
                    }
                    for name, cell in row.cells.items()
                },
            }
            for row in matrix.rows
        ],
    }
    if comparison is not None:
        document["same"] = comparison.same
        document["unknown"] = list(comparison.unknown)
        document["differences"] = [asdict(difference) for difference in comparison.differences]
    return document


def ladder_document(ladder: LadderSurvey) -> Document:
    """The ladder as JSON; `dense` and `moe` are the largest models that a rung unlocks."""
    return {
        "model": ladder.model,
        "rungs": [
            {
                "name": rung.name,
                "verdict": rung.assessment.verdict,
                "zero_stage": rung.assessment.zero_stage,
                "nodes": [
                    {
                        "name": node.node.name,
                        "peak_bytes": node.peak_bytes,
                        "limit_bytes": node.limit_bytes,
                        "verdict": node.verdict,
                    }
                    for node in rung.assessment.nodes
                ],
                "dense": _model(rung.dense),
                "moe": _model(rung.moe),
            }
            for rung in ladder.rungs
        ],
    }


def _model(found: tuple[str, int] | None) -> Document | None:
    return None if found is None else {"model": found[0], "parameters": found[1]}
