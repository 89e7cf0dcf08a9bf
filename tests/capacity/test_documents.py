"""What programs read from `--json`: the keys of every document, in their order."""

from __future__ import annotations

import json
from typing import Any

import pytest
from capacity import made_up

from mlx_empire.capacity.daughter_document import daughters_document
from mlx_empire.capacity.document import report_document
from mlx_empire.capacity.survey_document import ladder_document, matrix_document

PACE = (
    "wire built step_seconds positions_per_second tokens_per_second run_hours energy_kwh ends "
    "first_evaluation_hours first_checkpoint_hours lost_hours bound "
    "parts(compute network) timeline(seconds lanes(node lane spans))"
)
CELL = "(verdict zero_stage headroom headroom_bytes pooled_says worst_node reason)"
DOCUMENTS = {
    "report": (
        report_document,
        made_up.report,
        "model(name parameters trainable_parameters active_parameters family dtype not_trainable) setting verdict "
        "reason zero_stage nodes(name role memory_bytes limit_bytes share "
        "ledger(weights|optimizer m|gradients|gathered units) phase "
        "peak_bytes headroom_bytes largest_array_bytes buffer_limit_bytes live_buffers cache_bound_bytes verdict "
        "reason) "
        f"time({PACE}) times({PACE}) no_time cloud advice(change effect verdict) "
        "formulas(weights|optimizer m|gradients|gathered units|attention|logits chunk|adapters|MLX base: formula mark) "
        "notes disks(name checkpoint_bytes copies_bytes checkpoints_at_once result_bytes base_bytes token_cache_bytes "
        "asked_bytes least_bytes free_bytes verdict reason layer_inputs_bytes) "
        "untouched_macos(verdict commands(name command)) teacher",
    ),
    "matrix": (
        matrix_document,
        made_up.matrix,
        "clusters pooled_bytes(1K+3S) rows(model parameters active_parameters not_trainable "
        f"cells({' '.join(name + CELL for name in made_up.CLUSTERS)})) same unknown "
        "differences(model cluster file_says verdict why)",
    ),
    "ladder": (
        ladder_document,
        made_up.ladder,
        "model rungs(name verdict zero_stage nodes(name peak_bytes limit_bytes verdict) dense(model parameters) moe)",
    ),
    "daughters": (
        daughters_document,
        made_up.daughters,
        "model not_trainable training(way node trainable_parameters peak_bytes limit_bytes headroom_bytes verdict "
        "step_seconds positions_per_second tokens_per_second run_hours energy_kwh dollars) serving(way node "
        "weight_bytes adapter_bytes cache_bytes copies daughters load_seconds) count placements(way shared_base "
        "nodes(name models used_bytes limit_bytes) homeless)",
    ),
}


def keys(value: Any) -> str:
    """The keys in their order, with those inside in brackets; of a list, those of its first item."""
    if isinstance(value, list):
        return keys(value[0]) if value else ""
    if not isinstance(value, dict):
        return ""
    inside = {key: keys(item) for key, item in value.items()}
    if any(" " in key for key in inside):  # names of the ledger
        each = sorted(set(inside.values()) - {""})
        return "|".join(inside) + "".join(f": {one}" for one in each)
    return " ".join(f"{key}({text})" if text else key for key, text in inside.items())


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_the_keys_are_the_promised_ones_in_the_promised_order(name):
    document, make, expected = DOCUMENTS[name]
    assert keys(json.loads(json.dumps(document(make())))) == expected
