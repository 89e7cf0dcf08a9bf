"""Ternary weights, rounded, trained, or trained with a teacher: paired seeds on a small model made here.

For each seed a llama of 1.3 million parameters begins at random and is trained in float32; from there it goes on for as
many steps each, as it is, with `tuning.qat: ternary`, and with that and the float32 run's result as its teacher
(`distillation`, with its defaults). Told are held-out losses, cross-entropies all: of the float32 run, of its result
rounded (absmean, groups of 64, as QAT begins), and of the runs with QAT, whose evaluations are of ternary weights in
full. All of it by the command that a user types; a pair is of one seed, start, order of rows and number of steps. The
verdicts are paired t-tests over the seeds: rounded less trained, and trained alone less trained with the teacher; of
each the mean, its standard error and t.

`--model` begins with a folder's weights in place of that: then nothing is trained before.

    python benchmarks/ternary.py [--seeds 5] [--base 150] [--steps 100] [--json FILE]
    python benchmarks/ternary.py --model models/smollm2-135m --data data/quickstart --length 128 --rows 4 --seeds 1
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).parents[1]
TINY, SPEECHES = (ROOT / "tests" / "fixtures" / name for name in ("tiny-llama-260k", "speeches"))
SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
WAYS = "rounded", "qat", "distilled"
# Two-sided, 5 %, by degrees of freedom (Student 1908; any table of t).
CRITICAL = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def model_folder(folder: Path) -> Path:
    """A configuration and a tokenizer of 512 tokens, without weights."""
    folder.mkdir()
    config = json.loads((TINY / "config.json").read_text()) | SHAPE | {"torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder / name)
    return folder


def recipe_of(options: argparse.Namespace) -> str:
    """What all runs share."""
    return f"""\
data: {{path: {options.data}, format: text, sequence_length: {options.length}}}
batch: {{global_size: {options.rows}, micro_size: {options.rows}}}
optimizer: {{learning_rate: {options.rate}, statistics_every: null}}
schedule: {{type: cosine, warmup: 5%, final: 0.1}}
numerics: {{compiled_layers: true}}
run: {{dir: run, steps: 1, save_every: null, eval_batches: 8}}
"""


def trained(folder: Path, recipe: str, name: str, model: Path, steps: int, *settings: str) -> list[float]:
    """Held-out losses at the start and the end of a run; its result is in `folder/name/final`."""
    file = folder / f"{name}.yaml"
    file.write_text(f"model: {{path: {model}, dtype: float32}}\n{recipe}")
    words = [f"run.dir={folder / name}", f"run.steps={steps}", f"run.eval_every={steps}", *settings]
    subprocess.run(
        [sys.executable, "-m", "mlx_empire", "train", str(file), *words],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
        env=os.environ | {"MLX_EMPIRE_CACHE": str(folder / "cache")},
    )
    lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    return [record["eval_loss"] for record in lines if "eval_loss" in record]


def one_seed(folder: Path, options: argparse.Namespace, seed: int) -> dict[str, float]:
    """The losses of one seed."""
    folder.mkdir()
    recipe = recipe_of(options)
    own, qat = f"run.seed={seed}", ("tuning.qat=ternary", "tuning.qat_warmup=30%")
    if (base := options.model) is None:
        random, base = model_folder(folder / "random"), folder / "base" / "final"
        trained(folder, recipe, "base", random, options.base, own, "model.init=random")
    _, plain = trained(folder, recipe, "plain", base, options.steps, own)
    _, ternary = trained(folder, recipe, "qat", base, options.steps, own, *qat)
    teacher = f"distillation.teacher={folder / 'plain' / 'final'}"
    _, distilled = trained(folder, recipe, "distilled", base, options.steps, own, *qat, teacher)
    rounded, _ = trained(folder, recipe, "rounded", folder / "plain" / "final", 1, own, "tuning.qat=ternary")
    shutil.rmtree(folder)
    return {"seed": seed, "float32": plain, "rounded": rounded, "qat": ternary, "distilled": distilled}


def verdicts(rows: list[dict[str, float]]) -> dict[str, Any]:
    """The paired tests, and how far each way is above float32, as parts of its loss."""
    above = {way: fmean(row[way] / row["float32"] - 1 for row in rows) for way in WAYS}
    pairs = {f"{worse} - {better}": tested(rows, worse, better) for worse, better in pairwise(WAYS)}
    return {"above_float32": above, **pairs}


def tested(rows: list[dict[str, float]], worse: str, better: str) -> dict[str, Any]:
    """Whether one way's losses are above another's, by a paired t-test."""
    differences = [row[worse] - row[better] for row in rows]
    found: dict[str, Any] = {"mean": fmean(differences)}
    if len(rows) > 1:
        error = stdev(differences) / math.sqrt(len(rows))
        found |= {"standard_error": error, "t": found["mean"] / error}
        critical = CRITICAL.get(len(rows) - 1)
        found["better"] = None if critical is None else bool(found["t"] > critical)
    return found


def main() -> int:
    """The benchmark; exit code 1 where trained ternary weights are not better than rounded ones. What a teacher adds
    is told, and decides nothing."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--seeds", type=int, default=5)
    asked.add_argument("--base", type=int, default=150, help="steps in float32 before the pair")
    asked.add_argument("--steps", type=int, default=100, help="steps of each run of the pair")
    asked.add_argument("--rate", type=float, default=1e-3)
    asked.add_argument("--model", type=Path, help="the folder to begin with, in place of a model made here")
    asked.add_argument("--data", type=Path, default=SPEECHES)
    asked.add_argument("--length", type=int, default=64, help="positions of a row")
    asked.add_argument("--rows", type=int, default=8, help="rows of a step")
    asked.add_argument("--json", type=Path)
    options = asked.parse_args()
    options.model, options.data = options.model and options.model.absolute(), options.data.absolute()
    rows = []
    print("| seed | float32 | rounded | trained as ternary | with a teacher |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, options.seeds + 1):
            row = one_seed(Path(folder) / str(seed), options, seed)
            rows.append(row)
            told = "| {seed} | {float32:.4f} | {rounded:.4f} | {qat:.4f} | {distilled:.4f} |"
            print(told.format(**row), flush=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = verdicts(rows) | {"rows": rows, "base": options.base, "steps": options.steps}
    found["cpu_seconds"] = round(used.ru_utime + used.ru_stime)
    print(json.dumps({key: value for key, value in found.items() if key != "rows"}, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0 if found["rounded - qat"].get("better", True) else 1


if __name__ == "__main__":
    sys.exit(main())
