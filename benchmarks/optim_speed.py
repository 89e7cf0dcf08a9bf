"""How fast the optimizer's update is, beside MLX's own compiled AdamW in float32, in the same process.

Columns: milliseconds per million parameters (the median of alternating rounds), the ratio to stock, bytes per
parameter that the update must move (states and weights read and written, the gradient read), what share of a copy's
bandwidth that is. The last lines say what a user sees: a whole training step of a small llama with either.

    python benchmarks/optim_speed.py [--millions 4] [--rounds 7]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as stock_optimizers  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from optim_steps import OURS, STOCK, Step, ours, stock  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from support.tiny_models import tiny_model  # noqa: E402

from mlx_empire.optim import AdamW8bit  # noqa: E402

KINDS = (
    (OURS, {"state_bits": 8}),
    ("AdamW, 8 bits, diet master", {"state_bits": 8, "master_weights": "diet"}),
    ("AdamW, 32 bits, exact master", {}),
    ("Lion, 8 bits, exact master", {"state_bits": 8, "name": "lion"}),
    ("SGD, 8 bits, exact master", {"state_bits": 8, "name": "sgd"}),
)


def copy(elements: int) -> tuple[Step, float]:
    """A float32 array negated: 8 bytes per element are moved and nothing is computed."""
    source = mx.random.normal((elements,))
    mx.eval(source)

    def step() -> None:
        mx.eval(-source)

    return step, 8.0


def seconds(step: Step) -> float:
    """Of one step. On a CPU what the process computes counts, so that others' work on the machine does not."""
    clock = time.process_time if mx.default_device().type == mx.DeviceType.cpu else time.perf_counter
    began = clock()
    step()
    return clock() - began


def whole_step(make: Callable[[], stock_optimizers.Optimizer], dtype: mx.Dtype) -> Step:
    """A training step of a llama of 7 million parameters on 8 x 128 tokens, with float32 products."""
    build, _ = tiny_model(
        "llama", hidden_size=256, intermediate_size=768, head_dim=64, num_hidden_layers=8, vocab_size=2048
    )
    model = build()
    model.apply(lambda a: a.astype(dtype))
    optimizer = make()
    tokens = mx.random.randint(0, 2048, (8, 129))

    def loss(wide: dict[str, object]) -> mx.array:
        model.update(wide)
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")

    kept = model.trainable_parameters()

    def step() -> None:
        nonlocal kept
        wide = nn.utils.tree_map(lambda a: a.astype(mx.float32), kept)
        _, gradients = mx.value_and_grad(loss)(wide)
        kept = optimizer.apply_gradients(nn.utils.tree_map(lambda g: g.astype(dtype), gradients), kept)
        mx.eval(kept, optimizer.state)

    step.parameters = sum(a.size for _, a in tree_flatten(kept))
    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--millions", type=int, default=4, help="parameters, in 2^20")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    elements = options.millions << 20
    made = {
        STOCK: stock(elements, True),
        "MLX AdamW, without bias correction": stock(elements, False),
        "copy": copy(elements),
    }
    made |= {name: ours(elements, settings) for name, settings in KINDS}
    for step, _ in made.values():
        step(), step()
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(options.rounds):
        for name, (step, _) in made.items():
            times[name].append(seconds(step))
    each = {name: median(t) / elements for name, t in times.items()}
    bandwidth = made["copy"][1] / each["copy"]
    table = Table()
    for name in ("update", "ms per million", "speed of stock", "bytes moved", "of a copy's bandwidth"):
        table.add_column(name, justify="left" if name == "update" else "right")
    base = each[STOCK]
    for name, (_, moved) in made.items():
        if name != "copy":
            figures = f"{1e9 * each[name]:.1f}", f"{base / each[name]:.2f} x", f"{moved:.1f}"
            table.add_row(name, *figures, f"{100 * moved / each[name] / bandwidth:.0f} %")
    console = Console(width=110)
    console.print(table, f"a copy moves {bandwidth / 1e9:.1f} GB/s")
    both = {
        "MLX AdamW, float32": whole_step(
            lambda: stock_optimizers.AdamW(1e-4, bias_correction=True), mx.float32
        ),
        "AdamW8bit, bfloat16 + 16 bits": whole_step(lambda: AdamW8bit(1e-4), mx.bfloat16),
    }
    for step in both.values():
        step()
    runs = {name: [] for name in both}
    for _ in range(options.rounds):
        for name, step in both.items():
            runs[name].append(seconds(step))
    stock_step, ours_step = (median(t) for t in runs.values())
    millions = next(iter(both.values())).parameters / 1e6
    console.print(
        f"whole step, {millions:.1f} M parameters, 1,024 tokens: {1e3 * stock_step:.0f} ms with stock AdamW, "
        f"{1e3 * ours_step:.0f} ms with AdamW8bit ({ours_step / stock_step:.2f} x)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
