"""Finished daughters of the tiny llama that nobody trained: adapters of random values, each with words of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from support.rows import MODEL

STRENGTH = 0.3  # of lora_b: enough for other words, and for no gibberish
KEYS = {"lora": ["self_attn.q_proj", "mlp.down_proj"], "dora": ["self_attn.v_proj"]}


def write_adapter(folder: Path, seed: int, *, rank: int = 4, scale: float = 2.0, kind: str = "lora") -> None:
    """An adapter in mlx-lm's form."""
    folder.mkdir(parents=True)
    about = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": KEYS[kind]}
    model, _ = mlx_lm.load(str(MODEL))[:2]
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), about, use_dora=kind == "dora")
    adapters = {}
    for i, (name, array) in enumerate(tree_flatten(model.trainable_parameters())):
        value = (
            array
            if name.endswith(".m")
            else STRENGTH * mx.random.normal(array.shape, key=mx.random.key(seed + i))
        )
        adapters[name] = value
    mx.save_safetensors(str(folder / "adapters.safetensors"), adapters)
    config = {"fine_tune_type": kind, "num_layers": len(model.layers), "lora_parameters": about}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def finish(run: Path, model: Path = MODEL) -> None:
    """What says that the run in a folder, whose final/ is there, is finished."""
    recipe = {
        "model": {"path": str(model)},
        "tuning": {"type": "lora"},
        "data": {"path": "d", "sequence_length": 8},
        "batch": {"global_size": 1},
        "optimizer": {"learning_rate": 0.001},
        "run": {"dir": str(run), "steps": 1},
    }
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    (run / "plan.json").write_text("{}")
    (run / "COMPLETE").write_text("\n")


def answers(prompts: Sequence[str], adapter: Path | None, tokens: int, *, chat: bool = False) -> list[str]:
    """What mlx-lm alone makes of texts, or in a `chat` of a question."""
    path = None if adapter is None else str(adapter)
    model, tokenizer = mlx_lm.load(str(MODEL), adapter_path=path)[:2]
    said = []
    for prompt in prompts:
        question = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(question, add_generation_prompt=True) if chat else prompt
        said.append(str(mlx_lm.generate(model, tokenizer, asked, max_tokens=tokens)))
    return said
