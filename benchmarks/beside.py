"""Tokens per second and memory beside mlx-lm's own trainer on the same documents: `python benchmarks/beside.py`.

A step trains one set of documents, four of unequal lengths, all layers recomputed, AdamW, float32 arithmetic, one
process each. Ours packs them into one row. mlx-lm runs twice: with the documents padded to the longest, and strung
together as one row, in which tokens see the documents before theirs; the faster and the smaller one of the two counts.
The three follow one another on the same weights, PATH and BLAS, and a ratio is taken within such a round; the order
turns round by round. Seconds are a process's CPU seconds and, beside them, wall time, which on a busy machine means
nothing. The padded run must have our losses.

Cases are named `model-tuning-tokens`, such as smollm2-full-2048; models are smollm2, smollm2x4 (its first four layers),
mixture (qwen3_moe, 8 experts of which 2 take part) and gpt_oss, the last two small and at random, or a folder of the
checkout with a slash in its path.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from launching import LOSS_TOLERANCE, ROOT, SPEECHES, launch
from rich.console import Console
from rich.table import Table

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SMOLLM2 = ROOT / "models" / "smollm2-135m"
RESULTS = ROOT / "build" / "beside.json"
RANK, LEARNING_RATE, WARMUP = 8, 1e-4, 1
PARTS = (0.37, 0.27, 0.2, 0.16)  # of a step's tokens, by document
ADAMW_BYTES = 12  # of a trained parameter: gradient and two moments
TOKENS = (256, 2048, 8192)
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "mixture": (
        "qwen3_moe",
        {"hidden_size": 384, "num_attention_heads": 6, "moe_intermediate_size": 512, "num_experts": 8},
    ),
    "gpt_oss": ("gpt_oss", {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 512}),
}
SIZES = {"num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 4, "max_position_embeddings": 8192}


@dataclass(frozen=True)
class Timed:
    """One run: medians over its measured steps, bytes of its peak, and the losses of all steps."""

    cpu_seconds: float
    wall_seconds: float
    peak: int
    losses: list[float]


@dataclass(frozen=True)
class Case:
    """What all three runs are asked for."""

    model: str
    tuning: str
    tokens: int

    @classmethod
    def of(cls, name: str) -> Case:
        model, tuning, tokens = name.rsplit("-", 2)
        return cls(model, tuning, int(tokens))

    @property
    def name(self) -> str:
        return f"{self.model}-{self.tuning}-{self.tokens}"

    @property
    def bits(self) -> int:
        return 4 if self.tuning == "qlora" else 0


def main() -> int:
    """Measure, print a line for each round and a table, write everything as JSON."""
    parser = argparse.ArgumentParser(description="Beside mlx-lm's trainer, on the same documents.")
    every = [f"smollm2-{t}-{n}" for n in TOKENS for t in ("full", "lora", "qlora")]
    more = [f"{m}-full-{n}" for n in TOKENS for m in SMALL]
    parser.add_argument("--cases", nargs="+", default=[*every, *more], help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a run, after one of warm-up")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    console = Console(highlight=False, width=150)
    found: dict[str, Any] = {"steps": options.steps, "cores": os.cpu_count(), "cases": {}}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    table = Table("case", "CPU tokens/s x", "of the rounds", "wall x", "peak x", "above what stays x", "load")
    for case in map(Case.of, options.cases):
        with tempfile.TemporaryDirectory(prefix="beside-") as folder:
            measured = measure(case, Path(folder), options, console)
        found["cases"][case.name] = measured
        options.out.write_text(json.dumps(found, indent=1) + "\n")
        table.add_row(case.name, *summary(measured["rounds"], measured["stays"]), f"{measured['load']:.1f}")
    console.print(table)
    return 0


def measure(case: Case, folder: Path, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All rounds of a case, and what stays in memory whatever a step does."""
    model = model_folder(case.model, folder / "model")
    documents = write_documents(model, case.tokens, folder)
    rounds = []
    for number in range(options.rounds):
        ways = {
            "ours": lambda: ours(case, model, folder / "documents", options.steps),
            "padded": lambda: peer(
                case, model, folder / "documents" / "train.jsonl", documents, options.steps
            ),
            "one row": lambda: peer(
                case, model, folder / "row" / "train.jsonl", [case.tokens], options.steps
            ),
        }
        order = list(ways)[number % 3 :] + list(ways)[: number % 3]
        one = {way: ways[way]() for way in order}
        same = zip(one["ours"].losses, one["padded"].losses, strict=True)
        if not all(abs(a - b) <= LOSS_TOLERANCE * abs(b) for a, b in same):
            sys.exit(f"beside: {case.name}: losses {one['ours'].losses}, but {one['padded'].losses}")
        rounds.append({way: asdict(run) for way, run in one.items()})
        told = ", ".join(
            f"{way} {r.cpu_seconds:.2f} CPU s {r.peak / 2**20:.0f} MiB" for way, r in one.items()
        )
        console.print(f"{case.name}, round {number + 1}: {told}")
    return {"rounds": rounds, "stays": stays(case, model), "load": os.getloadavg()[0]}


def summary(rounds: Sequence[dict[str, Any]], stays: int) -> list[str]:
    """The cells of a case: medians of the rounds' ratios to the better of mlx-lm's two."""

    def ratios(key: str, less: int = 0) -> list[float]:
        return [
            (min(one["padded"][key], one["one row"][key]) - less) / (one["ours"][key] - less)
            for one in rounds
        ]

    speed = ratios("cpu_seconds")
    peaks, above = ([1 / r for r in ratios("peak", less)] for less in (0, stays))
    every = " ".join(f"{r:.2f}" for r in speed)
    wall = median(ratios("wall_seconds"))
    return [f"{median(speed):.2f}", every, f"{wall:.2f}", f"{median(peaks):.2f}", f"{median(above):.2f}"]


# ---- models and documents


def model_folder(name: str, folder: Path) -> Path:
    """Where the model of a case lies; a small one is made."""
    import mlx.core as mx

    if name == "smollm2":
        return SMOLLM2
    if "/" in name:
        return ROOT / name
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMOLLM2 / file, folder)
    if name.startswith("smollm2x"):
        layers = int(name.removeprefix("smollm2x"))
        config = json.loads((SMOLLM2 / "config.json").read_text()) | {"num_hidden_layers": layers}
        weights = {
            key: array
            for key, array in mx.load(str(SMOLLM2 / "model.safetensors")).items()
            if not key.startswith("model.layers.") or int(key.split(".")[2]) < layers
        }
    else:
        from mlx.utils import tree_flatten
        from support.tiny_models import tiny_config

        from mlx_empire.model.build import build_model

        family, sizes = SMALL[name]
        config = tiny_config(family, vocab_size=49152, **SIZES, **sizes)
        mx.random.seed(0)
        model = build_model(config, family)
        model.set_dtype(mx.float32)
        weights = dict(tree_flatten(model.parameters()))
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def write_documents(model: Path, tokens: int, folder: Path) -> list[int]:
    """`documents/train.jsonl` and, with all of them as one, `row/train.jsonl`; the documents' lengths."""
    from tokenizers import Tokenizer

    tokenizer, ids = Tokenizer.from_file(str(model / "tokenizer.json")), []
    for line in SPEECHES.read_text().splitlines():
        ids += tokenizer.encode(json.loads(line)["text"]).ids
    ids = (ids * (1 + tokens // len(ids)))[:tokens]
    lengths = [int(part * tokens) for part in PARTS]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    rows = [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    for name, written in (("documents", rows), ("row", [ids])):
        (folder / name).mkdir()
        text = "".join(json.dumps({"tokens": row}) + "\n" for row in written)
        (folder / name / "train.jsonl").write_text(text)
    return lengths


def stays(case: Case, model: Path) -> int:
    """Bytes of weights, gradients and states, in float32; what is quantised as it is stored."""
    from safetensors import safe_open

    with safe_open(str(model / "model.safetensors"), "np") as file:
        sizes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    count, adapters, packed = 0, 0, 0
    for key, shape in sizes.items():
        size = 1
        for n in shape:
            size *= n
        count += size
        if len(shape) == 2 and ".layers." in key:
            adapters += RANK * sum(shape)
        packed += size if len(shape) == 2 else 0
    if case.tuning == "full":
        return count * (4 + ADAMW_BYTES)
    base = (
        4 * count if not case.bits else 4 * (count - packed) + packed * 5 // 8
    )  # 4 bits, scale and bias of 64
    return base + adapters * (4 + ADAMW_BYTES)


# ---- runs


def ours(case: Case, model: Path, data: Path, steps: int) -> Timed:
    """The command itself, the documents packed into one row."""
    tuning = {} if case.tuning == "full" else {"tuning": {"type": case.tuning, "rank": RANK}}
    if case.bits:
        tuning["tuning"]["bits"] = case.bits
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        out = Path(temporary)
        recipe = {
            "model": {"path": str(model), "dtype": "float32"},
            **tuning,
            "data": {"path": str(data), "format": "tokens", "sequence_length": case.tokens, "packing": True},
            "batch": {"global_size": 1, "micro_size": 1},
            "optimizer": {
                "learning_rate": LEARNING_RATE,
                "clip_norm": None,
            },  # mlx-lm's trainer does not clip
            "memory": {"gradient_checkpointing": True},
            "report": {"progress": "never"},
            "run": {"dir": str(out / "run"), "steps": WARMUP + steps},
        }
        (out / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
        script = Path(__file__).parent / "timed_train.py"
        launch([sys.executable, "-u", str(script), str(out / "cpu.json"), str(out / "recipe.yaml")], out)
        cpu = json.loads((out / "cpu.json").read_text())
        records = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    return Timed(
        median(cpu[WARMUP:]),
        median(record["step_seconds"] for record in records[WARMUP:]),
        max(records[-1]["peak_bytes"]),
        [record["loss"] for record in records],
    )


def peer(case: Case, model: Path, data: Path, lengths: Sequence[int], steps: int) -> Timed:
    """mlx-lm's trainer on rows of these lengths, padded to the longest."""
    full = case.tuning == "full"
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        out = Path(temporary)
        arguments = {
            "model": model,
            "data": data,
            "global-size" if full else "rows": len(lengths),
            "width": max(lengths) - 1,
            "steps": WARMUP + steps,
            "learning-rate": LEARNING_RATE,
            "out": out,
            **({} if full else {"rank": RANK, "bits": case.bits, "checkpointing": 1}),
        }
        script = Path(__file__).parent / ("mlx_lm_peer.py" if full else "mlx_lm_lora_peer.py")
        words = [word for key, value in arguments.items() for word in (f"--{key}", str(value))]
        launch([sys.executable, str(script), *words], out)
        reports = json.loads((out / "reports.json").read_text())["reports"]
    counted = reports[WARMUP:]
    return Timed(
        median(report["cpu_seconds"] for report in counted),
        median(1 / report["iterations_per_second"] for report in counted),
        int(reports[-1]["peak_memory"] * 1e9),
        [report["train_loss"] for report in reports],
    )


if __name__ == "__main__":
    sys.exit(main())
