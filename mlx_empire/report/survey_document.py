"""Decides what the matrix, the ladder and the daughters say, as plain JSON for `--json`, terminal and page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_empire.plan.ladder import Rung
from mlx_empire.plan.matrix import Comparison, Matrix

Document = dict[str, Any]


def matrix_document(matrix: Matrix, comparison: Comparison | None = None) -> Document:
    """Every model on every cluster; `headroom` is a fraction of the worst node's limit."""
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
        document["differences"] = [
            {
                "model": d.model,
                "cluster": d.cluster,
                "file_says": d.file_says,
                "verdict": d.verdict,
                "why": d.why,
            }
            for d in comparison.differences
        ]
    return document


def ladder_document(model: str, rungs: Sequence[Rung]) -> Document:
    """One model under one technique after the other; `dense` and `moe` are the largest models that a rung unlocks."""
    return {
        "model": model,
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
            for rung in rungs
        ],
    }


def _model(found: tuple[str, int] | None) -> Document | None:
    return None if found is None else {"model": found[0], "parameters": found[1]}
