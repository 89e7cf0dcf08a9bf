"""Small models of the families with a model file of our own, and weights for them that any library can make.

`tests/fixtures/families.json` holds what transformers on torch computes of them (tests/interop compares it again;
`PYTHONPATH=tests python -m support.our_families` writes it, where torch is installed).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

FIXTURE = Path(__file__).parents[1] / "fixtures" / "families.json"
WIDTH = 300  # behind 256 bfloat16 no longer tells positions apart
TOKENS = [[1 + (31 * i * i + 7 * j * j + 3 * i * j) % 250 for j in range(WIDTH)] for i in range(2)]
PLACES, WORDS = (
    (5, 150, 255, 299),
    16,
)  # of the logits that are kept: positions, and the first of the vocabulary

SIZES = {
    **{"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
NEW = {"new_decoder_architecture": True, "num_kv_heads": 2}
APART = {"multi_query": False, "bias": True}
CASES: dict[str, dict[str, Any]] = {
    "olmo": {"model_type": "olmo", "intermediate_size": 96},
    "olmo clipped": {"model_type": "olmo", "intermediate_size": 96, "clip_qkv": 0.5},
    "olmo tied": {
        "model_type": "olmo",
        **{
            "intermediate_size": 96,
            "num_key_value_heads": 2,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    },
    "olmo stretched": {
        "model_type": "olmo",
        "intermediate_size": 96,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4},
    },
    "falcon-7b": {"model_type": "falcon"},
    "falcon-40b": {"model_type": "falcon", **NEW},
    "falcon-11b": {"model_type": "falcon", **NEW, "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False},
    "falcon-rw": {"model_type": "falcon", **APART, "alibi": True, "parallel_attn": False},
    "falcon ALiBi, 6 heads": {
        "model_type": "falcon",
        **{**APART, "alibi": True, "num_attention_heads": 6, "hidden_size": 96, "ffn_hidden_size": 128},
    },
    "falcon one after the other": {"model_type": "falcon", "parallel_attn": False, "rope_theta": 5e4},
    "falcon multi-head": {"model_type": "falcon", **APART, "activation": "relu"},
}


def config_of(name: str) -> dict[str, Any]:
    """What transformers is given: silent where a published folder may be."""
    return {**SIZES, **CASES[name]}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor by its name, float32: large enough that every key of a configuration shows in the logits."""
    drawn = np.random.RandomState(crc32(name.encode())).normal(size=shape)
    centre = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0  # a norm's
    return (centre + 0.15 * drawn).astype(np.float32)


def kept(logits: np.ndarray) -> np.ndarray:
    """(rows, width, vocabulary) -> (rows, places, words): what the fixture holds."""
    return logits[:, list(PLACES), :WORDS]


def torch_model(name: str) -> Any:
    """transformers' own model with these weights."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**config_of(name))
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight(path, tuple(parameter.shape))))
    return model


def torch_logits(model: Any) -> np.ndarray:
    """(rows, width, vocabulary) of TOKENS."""
    import torch

    with torch.no_grad():
        found: np.ndarray = model(torch.tensor(TOKENS), use_cache=False).logits.numpy()
    return found


def main() -> None:
    """Write the fixture."""
    found = {
        name: kept(torch_logits(torch_model(name))).astype(np.float64).round(6).tolist() for name in CASES
    }
    FIXTURE.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
