"""Does 8-bit training end where float32 training ends? Paired seeds on real models: `make bench-quality`.

Arms store bfloat16 weights and compute in float32, on the same start, the same order of data and the same held-out
set. The plain arm has 32-bit states and exact masters: bit for bit float32 masters with a bfloat16 copy. For each arm:
the mean over seeds of its held-out loss over the plain arm's, less 1, and |mean| + 2 standard errors, which is what may
be claimed; a lower loss counts as a deviation too. The noise floor is training with float32 weights from a start moved
by 1e-6, against the same unmoved.

    python benchmarks/quality.py [--seeds 5] [--steps 200] [--only wordnet] [--json FILE]

SmolLM2-135M takes a twentieth of the steps, with half the rows each: on a CPU a step of it takes seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as stock_optimizers  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_map  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from support.tiny_models import tiny_model  # noqa: E402

from mlx_empire.data.splits import load_splits  # noqa: E402
from mlx_empire.optim import AdamW8bit  # noqa: E402

FIXTURES = ROOT / "tests" / "fixtures"
TINY = FIXTURES / "tiny-llama-260k"
SMOLLM2 = ROOT / "models" / "smollm2-135m"
HELD_OUT = 128  # rows, judged eight at a time
Make = Callable[[Any], stock_optimizers.Optimizer]
PLAIN, WIDE = "32-bit states, exact master", "32-bit states, float32 weights"


@dataclass(frozen=True)
class Arm:
    """How weights are kept, and the optimizer by its learning rate (a schedule)."""

    name: str
    dtype: mx.Dtype
    make: Make
    moved: bool = False
    against: str = PLAIN


def ours(bits: int, master: str) -> Make:
    return lambda rate: AdamW8bit(rate, weight_decay=0.0, state_bits=bits, master_weights=master)


def stock(rate: Any) -> stock_optimizers.Optimizer:
    return stock_optimizers.AdamW(rate, weight_decay=0.0, bias_correction=True)


ARMS = (
    Arm(PLAIN, mx.bfloat16, ours(32, "exact")),
    Arm(WIDE, mx.float32, ours(32, "exact")),
    Arm("noise floor: start moved by 1e-6", mx.float32, ours(32, "exact"), moved=True, against=WIDE),
    Arm("8-bit states, exact master", mx.bfloat16, ours(8, "exact")),
    Arm("8-bit states, diet master", mx.bfloat16, ours(8, "diet")),
    Arm("8-bit states, no master", mx.bfloat16, ours(8, "none")),
    Arm("stock MLX AdamW, all bfloat16", mx.bfloat16, stock),
)


@dataclass(frozen=True)
class Setting:
    """A model with its data: rows (n, width + 1) of tokens to train on and to be judged by.

    `rows` of a step; `share` of the steps asked for; `rate` the largest learning rate; `floor`: whether the noise
    floor is measured too.
    """

    name: str
    model: Callable[[], nn.Module]
    train: np.ndarray
    held_out: np.ndarray
    rate: float
    rows: int = 8
    share: float = 1.0
    floor: bool = True


def wordnet() -> Setting:
    """The trained tiny llama learns to define words."""
    rows = _tokens("wordnet", "chat", TINY, 512)
    return Setting("tiny llama, 260 k, on WordNet", lambda: load_model(TINY)[0], *rows, 1e-3)


def smollm2() -> Setting:
    """SmolLM2-135M learns to define words."""
    train, held_out = _tokens("wordnet", "chat", SMOLLM2, 49152)
    return Setting(
        "SmolLM2-135M on WordNet",
        lambda: load_model(SMOLLM2)[0],
        train,
        held_out[: HELD_OUT // 4],
        1e-4,
        rows=4,
        share=0.05,
        floor=False,
    )


def speeches() -> Setting:
    """A llama of 1.2 million parameters from scratch, on bytes of speeches."""
    texts = [
        np.frombuffer((FIXTURES / "speeches" / name).read_bytes(), np.uint8).astype(np.int32) % 128
        for name in ("train.jsonl", "valid.jsonl")
    ]
    train, held_out = (a[: len(a) // 65 * 65].reshape(-1, 65) for a in texts)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "head_dim": 32, "num_hidden_layers": 6}

    def model() -> nn.Module:
        mx.random.seed(0)
        build, _ = tiny_model("llama", **sizes, vocab_size=128, tie_word_embeddings=True)
        return build()

    return Setting("llama, 1.2 M, from scratch on speeches", model, train, held_out[:HELD_OUT], 1e-3)


SETTINGS = {"wordnet": wordnet, "smollm2": smollm2, "speeches": speeches}


def _tokens(folder: str, form: str, tokenizer: Path, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    splits = load_splits(
        path=FIXTURES / folder,
        format=form,
        sequence_length=64,
        packing=True,
        mask_prompt=False,
        validation_split=0.0,
        tokenizer_folder=tokenizer,
        vocab_size=vocabulary,
    )

    def flat(data: Any) -> np.ndarray:
        tokens = np.concatenate(
            [np.append(data.row(i).inputs, data.row(i).targets[-1]) for i in range(len(data))]
        )
        return tokens[: len(tokens) // 65 * 65].reshape(-1, 65).astype(np.int32)

    return flat(splits.train), flat(splits.valid)[:HELD_OUT]


def run(setting: Setting, arm: Arm, seed: int, steps: int) -> float:
    """The held-out loss after `steps` steps."""
    model = setting.model()
    begin = max(steps // 10, 1)
    warmup = stock_optimizers.linear_schedule(0.0, setting.rate, begin)
    decay = stock_optimizers.cosine_decay(setting.rate, steps - begin, 0.1 * setting.rate)
    optimizer = arm.make(stock_optimizers.join_schedules([warmup, decay], [begin]))
    scale = 1 + 1e-6 if arm.moved else 1.0
    start = tree_map(lambda a: a.astype(mx.bfloat16).astype(mx.float32) * scale, model.trainable_parameters())
    kept = tree_map(lambda a: a.astype(arm.dtype), start)

    def loss(wide: Any, rows: mx.array) -> mx.array:
        model.update(wide)
        return nn.losses.cross_entropy(model(rows[:, :-1]), rows[:, 1:], reduction="mean")

    @mx.compile
    def gradients(wide: Any, rows: mx.array) -> Any:
        value, grads = mx.value_and_grad(loss)(wide, rows)
        grads, _ = stock_optimizers.clip_grad_norm(grads, 1.0)
        return value, grads

    wanted = steps * setting.rows
    order = np.random.default_rng(seed).permutation(max(len(setting.train), wanted))[:wanted]
    order = order % len(setting.train)
    for batch in order.reshape(steps, setting.rows):
        wide = tree_map(lambda a: a.astype(mx.float32), kept)
        _, grads = gradients(wide, mx.array(setting.train[batch]))
        if isinstance(optimizer, stock_optimizers.AdamW):
            grads = tree_map(lambda g: g.astype(arm.dtype), grads)
        kept = optimizer.apply_gradients(grads, kept)
        mx.eval(kept, optimizer.state)
    wide = tree_map(lambda a: a.astype(mx.float32), kept)
    whole = len(setting.held_out) // 8 * 8
    return fmean(loss(wide, mx.array(rows)).item() for rows in setting.held_out[:whole].reshape(-1, 8, 65))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", choices=list(SETTINGS), help="one of the settings")
    parser.add_argument("--json", type=Path, help="keep every run's loss here")
    options = parser.parse_args()
    console, kept = Console(width=110), {}
    wanted = [make for name, make in SETTINGS.items() if options.only in (None, name)]
    if smollm2 in wanted and not (SMOLLM2 / "config.json").exists():
        wanted.remove(smollm2)
        console.print(f"SmolLM2 is left out: it is not in {SMOLLM2}; run `make quickstart` once")
    for setting in (make() for make in wanted):
        steps = round(options.steps * setting.share)
        table = Table(title=f"{setting.name}: {steps} steps, {options.seeds} seeds", title_justify="left")
        for i, name in enumerate(("arm", "held-out loss", "difference", "|mean| + 2 s.e.")):
            table.add_column(name, justify="right" if i else "left")
        found: dict[str, list[float]] = {}
        for arm in (a for a in ARMS if setting.floor or WIDE not in (a.name, a.against)):
            found[arm.name] = [run(setting, arm, seed, steps) for seed in range(options.seeds)]
            pairs = [b / a - 1 for a, b in zip(found[arm.against], found[arm.name], strict=True)]
            error = stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else float("nan")
            claim = f"{100 * (abs(fmean(pairs)) + 2 * error):.4f} %"
            table.add_row(arm.name, f"{fmean(found[arm.name]):.5f}", f"{100 * fmean(pairs):+.4f} %", claim)
            print(f"{setting.name}: {arm.name} {found[arm.name]}", file=sys.stderr, flush=True)
        console.print(table)
        kept[setting.name] = found
    if options.json:
        options.json.write_text(json.dumps(kept, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
