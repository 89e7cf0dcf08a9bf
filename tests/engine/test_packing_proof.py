"""Rows that are read together do not see each other's documents, in any of mlx-lm's modules; a proof says so."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from support.every_model import models, small_config
from support.tiny_models import tiny_config, tiny_model

import mlx_empire.model.layers as layers
from mlx_empire.engine.packing_proof import verify_packing
from mlx_empire.engine.streamable import verify_scaled_down
from mlx_empire.errors import UserError
from mlx_empire.model.build import build_model
from mlx_empire.model.unread import refuse_row_length

BY_GROUPS = ("gemma2", "phi3small")
DAILY = (*BY_GROUPS, "llama", "gpt_oss", "qwen3_moe", "llama4", "cohere2")
# What the proof of streaming refuses before, or mlx-lm cannot build here, so that no rows of it are ever packed.
NEVER = ("afm7", "deepseek_v41", "gemma3n", "iquestloopcoder", "muse_spark", "prism_hadamard_qwen35", "rwkv7")
DAILY_OR_SLOW = [
    pytest.param(n, marks=() if n in DAILY else pytest.mark.slow)
    for n in models()
    if n not in (*NEVER, "recurrent_gemma")
]


@pytest.mark.parametrize("name", DAILY_OR_SLOW)
def test_a_row_is_read_together_with_others_as_it_is_alone(name: str) -> None:
    mx.random.seed(0)
    model = build_model(small_config(name), name)
    model.set_dtype(mx.float32)
    verify_packing(model.eval(), name, 200, 1e-4)


@pytest.mark.parametrize("heads", [2, 1, 4])
def test_a_mask_that_is_broadcast_over_heads_is_found_out(
    heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many rows as groups of heads: nothing fails, and a row has another one's documents."""
    config = tiny_config("gemma2", num_key_value_heads=heads)
    verify_scaled_down(config, "gemma2", packs=True)
    monkeypatch.setattr(layers, "_scores_by_groups", lambda _: False)
    if heads == 4:  # as many as heads: no groups
        verify_scaled_down(config, "gemma2", packs=True)
        return
    with pytest.raises(
        UserError, match=r"data\.packing: true: gemma2: (a row's documents see|its layers cannot read)"
    ):
        verify_scaled_down(config, "gemma2", packs=True)
    verify_scaled_down(config, "gemma2")


def test_two_rows_with_two_groups_of_heads_were_wrong_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_scores_by_groups", lambda _: False)
    monkeypatch.setattr("mlx_empire.engine.packing_proof.ROWS", 2)
    model = tiny_model("gemma2")[0]()
    with pytest.raises(UserError, match="a row's documents see those of other rows"):
        verify_packing(model.eval(), "gemma2", 200, 1e-4)


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (tiny_config("llama4"), 32),
        (tiny_config("llama4", attention_chunk_size=9000), 8191),
        (tiny_config("llama4", attention_chunk_size=9000, attn_temperature_tuning=0), 9000),
        ({**small_config("phi3small"), "blocksparse_block_size": 32, "blocksparse_num_local_blocks": 4}, 128),
    ],
)
def test_rows_in_which_a_document_would_be_read_otherwise_than_alone_are_not_packed(
    config: dict[str, object], most: int
) -> None:
    refuse_row_length(config, most, "m", packed=True)
    refuse_row_length(config, most + 1, "m")
    with pytest.raises(
        UserError, match=f"data.packing: true: in rows of {most + 1} positions m .* at most {most},"
    ):
        refuse_row_length(config, most + 1, "m", packed=True)


def test_a_family_whose_masks_are_mlxs_own_is_not_told_apart_by_hand() -> None:
    """The list of families is what this is about: another one joins it only with a test."""
    assert Path(layers.__file__).read_text().count('case "') == len(BY_GROUPS)
