"""The peer: `mlx_lm.lora`'s own layers and trainer on one machine, doing the same work as ours.

Rows, rank, scale, layers, targets, gradient checkpointing, AdamW and the adapters' first values are ours, so that the
losses must agree step by step; everything else is mlx-lm's as it is.
"""

import argparse
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model
from mlx_lm_peer import train_recorded

from mlx_empire.model.lora import initial_adapter
from mlx_empire.model.spec import TensorSpec


def main() -> None:
    """Train for `--steps` steps with one report for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help='a file of {"tokens": [...]} lines')
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--width", type=int, required=True, help="input positions of a row")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--bits", type=int, default=0, help="quantise the base; 0: leave it")
    parser.add_argument("--checkpointing", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    model, _ = load_model(options.model)
    model.set_dtype(mx.float32)
    if options.bits:
        nn.quantize(model, 64, options.bits)
    model.freeze()
    keys = {k for layer in model.layers for k, m in layer.named_modules() if hasattr(m, "to_quantized")}
    keys |= {
        k for layer in model.layers for k, m in layer.named_modules() if isinstance(m, nn.QuantizedLinear)
    }
    settings = {"rank": options.rank, "scale": 2.0, "dropout": 0.0, "keys": sorted(keys)}
    linear_to_lora_layers(model, len(model.layers), settings)
    first = [
        (name, initial_adapter(TensorSpec(name, tuple(array.shape), "float32"), 0))
        for name, array in tree_flatten(model.trainable_parameters())
    ]
    model.load_weights(first, strict=False)
    mx.eval(model.parameters())
    mx.reset_peak_memory()

    reports = train_recorded(model, options, options.rows, checkpointing=bool(options.checkpointing))
    trained = sum(a.size for _, a in tree_flatten(model.trainable_parameters()))
    (options.out / "reports.json").write_text(json.dumps({"trained": trained, "reports": reports}))


if __name__ == "__main__":
    main()
