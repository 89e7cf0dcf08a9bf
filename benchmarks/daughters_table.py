"""What a smaller base costs a daughter: LoRA, 4-bit QLoRA and ternary LoRA on SmolLM2-135M, learning to define words.

Each learns from the same rows of WordNet for the same number of steps; the table says what it holds in memory and its
held-out loss, before and after. `python benchmarks/daughters_table.py` prints it as Markdown.

MLX multiplies packed matrices slowly on a CPU. So memory is measured in one step on the packed base, and losses on the
same values unpacked, which give the same (tests/adapters/test_steps.py holds them within 1e-5).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from launching import ROOT, launch

from mlx_empire.formats.convert import unpack
from mlx_empire.formats.export_folder import FolderWriter
from mlx_empire.formats.hf_folder import open_folder
from mlx_empire.formats.source import FolderSource
from mlx_empire.model.config import read_config
from mlx_empire.model.quantize import QUANT_FORMATS, quantize
from mlx_empire.model.target import make_target
from mlx_empire.recipe.schema import TuningSection

MODEL = ROOT / "models" / "smollm2-135m"
DATA = ROOT / "tests" / "fixtures" / "wordnet"
WAYS: dict[str, dict[str, Any]] = {
    "LoRA, base in float32": {"type": "lora"},
    "QLoRA, 8 bit": {"type": "qlora", "bits": 8},
    "QLoRA, 4 bit": {"type": "qlora", "bits": 4},
    "QLoRA, mxfp4": {"type": "qlora", "bits": "mxfp4"},
    "LoRA on a ternary base": {"type": "qlora", "bits": "ternary"},
}


def main() -> int:
    """Train them one after the other, print the table."""
    parser = argparse.ArgumentParser(description="Memory and held-out loss of daughters by their base.")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--data", type=Path, default=DATA, help="a folder with train.jsonl and valid.jsonl")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=4, help="rows of a step")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "daughters.json")
    options = parser.parse_args()
    found = {}
    for name in options.ways:
        found[name] = run(name, options)
        print(line(name, found[name]), file=sys.stderr, flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps({"steps": options.steps, "rows": options.rows, "ways": found}, indent=1)
    )
    print(
        f"| {options.steps} steps of {options.rows} rows | base, MiB | peak, MiB | held-out loss before | after |"
    )
    print("|---|---|---|---|---|")
    for name, figures in found.items():
        print(line(name, figures))
    return 0


def run(name: str, options: argparse.Namespace) -> dict[str, float]:
    """One daughter; figures in bytes and nats per token."""
    bits = WAYS[name].get("bits")
    with tempfile.TemporaryDirectory(prefix="daughters-") as text:
        folder = Path(text)
        if bits is None:
            records, plan = train(folder, options.model, WAYS[name], options, options.steps)
            losses = [r["eval_loss"] for r in records if "eval_loss" in r]
        else:
            unpack_into(folder / "model", options.model, bits)
            first, _ = train(folder, folder / "model", {"type": "lora"}, options, options.steps)
            losses = [r["eval_loss"] for r in first if "eval_loss" in r]
            records, plan = train(folder, options.model, WAYS[name], options, 1)
    steps = [r for r in records if "eval_loss" not in r]
    return {
        "base_bytes": plan["ranks"][0]["ledger"]["weights"],
        "peak_bytes": steps[-1]["peak_bytes"][0],
        "before": losses[0],
        "after": losses[-1],
    }


def train(
    folder: Path, model: Path, tuning: dict[str, Any], options: argparse.Namespace, steps: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(records, plan) of a run, evaluated before and after where it has more than one step."""
    recipe = {
        "model": {"path": str(model.resolve()), "dtype": "float32"},
        "tuning": {**tuning, "rank": 8},
        "data": {"path": str(options.data.resolve()), "format": "chat", "sequence_length": 128},
        "batch": {"global_size": options.rows, "micro_size": options.rows},
        "optimizer": {"learning_rate": options.learning_rate},
        "schedule": {"type": "cosine", "warmup": 1},
        "memory": {"gradient_checkpointing": True},
        "report": {"progress": "never"},
    }
    run_dir, file = folder / f"run-{steps}", folder / "recipe.yaml"
    evaluated = {"eval_every": steps, "eval_batches": 10} if steps > 1 else {}
    file.write_text(json.dumps({**recipe, "run": {"dir": str(run_dir), "steps": steps, **evaluated}}))
    launch([sys.executable, "-u", "-m", "mlx_empire.train", str(file)], folder)
    records = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return records, json.loads((run_dir / "plan.json").read_text())


def unpack_into(out: Path, model: Path, bits: int | str) -> None:
    """The model with the values that its packed matrices stand for, in float32."""
    packing, config = QUANT_FORMATS[bits], read_config(model)
    plain = make_target(config, TuningSection(), str(model), "float32", open_folder(model).stored())
    source = FolderSource(model, plain.rebuild, plain.spec)
    with FolderWriter(out, plain.spec, plain.rebuild, model) as writer:
        for index in range(len(plain.spec.units)):
            tensors = {}
            for tensor, array in source.unit(index):
                if tensor.name.endswith(".weight") and packing.packs(
                    tensor.name, tensor.shape, root=index == 0
                ):
                    array = unpack(quantize(array, packing), packing)
                tensors[tensor.name] = array
            writer.write_unit(index, tensors)


def line(name: str, figures: dict[str, float]) -> str:
    """One way in Markdown."""
    sizes = [f"{figures[key] / 2**20:,.0f}" for key in ("base_bytes", "peak_bytes")]
    return f"| {name} | {' | '.join(sizes)} | {figures['before']:.2f} | {figures['after']:.2f} |"


if __name__ == "__main__":
    sys.exit(main())
