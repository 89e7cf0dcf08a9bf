"""AdamW with small states, ours and others', on the same recorded gradients: `make bench-optim`.

Every optimizer starts from the same weights, sees the same 400 gradients of a small llama (tests/support/recorded.py)
at the same rate and is compared with AdamW in float64, for beta2 = 0.999 and 0.95. Columns:

- m + v, all: bytes per parameter of the moments, and with weights and what is kept beside them;
- update: mean over steps of |update - true update| / |true update|; updates are seen in the master weights;
- v bias: mean of sqrt(v / true v), less 1, at the end;
- largest: the largest update over the largest true one, at its worst step;
- moved: the same error as update's for the sum of all updates.

What is not installed is listed with its reason; `make bench-optim` installs the others. --json FILE keeps the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

# Small matrices: threads and compilation would cost more than they give.
for name, value in {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}.items():
    os.environ.setdefault(name, value)
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from support.recorded import adamw, recorded_gradients  # noqa: E402

RATE = 1e-3


class Peer(Protocol):
    """An optimizer at work on one matrix (rows, 64)."""

    moments: float  # bytes per parameter
    all: float

    def step(self, gradient: np.ndarray) -> None: ...

    def weights(self) -> np.ndarray: ...

    def second(self) -> np.ndarray: ...


@dataclass
class Row:
    name: str
    beta2: float
    moments: float
    all: float
    update: float
    v_bias: float
    largest: float
    moved: float


def measure(name: str, peer: Peer, start: np.ndarray, gradients: np.ndarray, beta2: float) -> Row:
    """Run `peer` beside the float64 reference."""
    w = start.astype(np.float64)
    m, v = np.zeros_like(w), np.zeros_like(w)
    errors, worst = [], 0.0
    for step, g in enumerate(gradients, 1):
        before, before_true = peer.weights(), w
        peer.step(g)
        w, m, v = adamw(w, m, v, g, step, RATE, beta2)
        update, true = peer.weights() - before, w - before_true
        errors.append(np.linalg.norm(update - true) / np.linalg.norm(true))
        worst = max(worst, np.abs(update).max() / np.abs(true).max())
    known = v > 2.0**-90
    bias = np.sqrt(np.maximum(peer.second()[known], 0) / v[known]).mean() - 1
    moved = np.linalg.norm(peer.weights() - w) / np.linalg.norm(w - start)
    return Row(name, beta2, peer.moments, peer.all, *map(float, (np.mean(errors), bias, worst, moved)))


# ---- ours


class Ours:
    def __init__(self, start: np.ndarray, beta2: float, master: str = "exact") -> None:
        from mlx_empire.optim.adamw import AdamW

        self.rule = AdamW((0.9, beta2), state_bits=8, master_weights=master)
        self.w = mx.array(start).astype(mx.bfloat16)
        self.state, self.count = self.rule.init(self.w, quantised=True), 0
        sizes = {name: array.nbytes / start.size for name, array in self.state.items()}
        self.moments = sum(size for name, size in sizes.items() if name[:2] in ("m_", "v_"))
        self.all = 2 + sum(sizes.values())

    def step(self, gradient: np.ndarray) -> None:
        from mlx_empire.optim.protocol import ChunkId, StepScalars

        self.count += 1
        chunk, scalars = ChunkId(7, 0, False), StepScalars(self.count, RATE)
        self.w, self.state = self.rule.update(self.w, self.state, mx.array(gradient), chunk, scalars)

    def weights(self) -> np.ndarray:
        from mlx_empire.optim import master

        return np.array(master.joined(self.w, self.state), np.float64)

    def second(self) -> np.ndarray:
        from mlx_empire.optim import codec

        return np.array(codec.decode_second(self.state), np.float64)


# ---- MLX


class Stock:
    def __init__(self, start: np.ndarray, beta2: float, dtype: mx.Dtype) -> None:
        from mlx.optimizers import AdamW

        self.rule = AdamW(RATE, betas=[0.9, beta2], weight_decay=0.0, bias_correction=True)
        self.tree, self.dtype = {"w": mx.array(start).astype(dtype)}, dtype
        self.rule.init(self.tree)
        self.moments, self.all = 2.0 * dtype.size, 3.0 * dtype.size

    def step(self, gradient: np.ndarray) -> None:
        self.tree = self.rule.apply_gradients({"w": mx.array(gradient).astype(self.dtype)}, self.tree)
        mx.eval(self.tree, self.rule.state)

    def weights(self) -> np.ndarray:
        return np.array(self.tree["w"].astype(mx.float32), np.float64)

    def second(self) -> np.ndarray:
        return np.array(self.rule.state["w"]["v"].astype(mx.float32), np.float64)


# ---- torch


class Torch:
    """A torch optimizer on one parameter; `second` reads its v, `kept` counts bytes of a state's entry."""

    def __init__(self, start: np.ndarray, make: Callable[[Any], Any], *, low: bool = False) -> None:
        import torch

        self.p = torch.nn.Parameter(
            torch.from_numpy(start.copy()).to(torch.bfloat16 if low else torch.float32)
        )
        self.rule = make([self.p])
        self.step(np.zeros_like(start), count=False)
        sizes = {
            k: _torch_bytes(v) / start.size for k, v in self._state.items() if "qmap" not in k and k != "step"
        }
        other = sum(size for k, size in sizes.items() if "kahan" in k)
        self.moments = sum(sizes.values()) - other
        self.all = self.moments + other + (2 if low else 4)
        self.p = torch.nn.Parameter(self.p.detach().clone())
        self.rule = make([self.p])  # the step above was only to see the state

    @property
    def _state(self) -> dict[str, Any]:
        return self.rule.state[self.p]

    def step(self, gradient: np.ndarray, count: bool = True) -> None:
        import torch

        self.p.grad = torch.from_numpy(gradient.copy()).to(self.p.dtype)
        self.rule.step()

    def weights(self) -> np.ndarray:
        w = self.p.detach().double()
        kahan = self._state.get("kahan_comp") if self.p in self.rule.state else None
        return (w if kahan is None else w + kahan.double()).numpy().copy()

    def second(self) -> np.ndarray:
        state = self._state
        if "state2" in state:
            import bitsandbytes.functional as quantise

            v = quantise.dequantize_blockwise(
                state["state2"], absmax=state["absmax2"], code=state["qmap2"], blocksize=256
            )
        else:
            v = state["exp_avg_sq"]
            v = v.dequantize() if hasattr(v, "codes") else v
        return v.double().numpy().reshape(self.p.shape).copy()


def _torch_bytes(value: Any) -> int:
    import torch

    if hasattr(value, "codes"):
        return sum(part.numel() * part.element_size() for part in (value.codes, value.scale))
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def torchao(kind: str) -> Callable[[np.ndarray, float], Peer]:
    def make(start: np.ndarray, beta2: float) -> Peer:
        import torchao.optim as optim

        rule = getattr(optim, kind)
        return Torch(start, lambda p: rule(p, lr=RATE, betas=(0.9, beta2), weight_decay=0.0))

    return make


def bitsandbytes(start: np.ndarray, beta2: float) -> Peer:
    import bitsandbytes as bnb

    options = {"lr": RATE, "betas": (0.9, beta2), "weight_decay": 0.0, "min_8bit_size": 1}
    return Torch(start, lambda p: bnb.optim.AdamW8bit(p, **options))


def kahan(start: np.ndarray, beta2: float) -> Peer:
    import optimi

    options = {"lr": RATE, "betas": (0.9, beta2), "weight_decay": 0.0, "eps": 1e-8, "kahan_sum": True}
    return Torch(start, lambda p: optimi.AdamW(p, **options), low=True)


# ---- jax


class Flash:
    def __init__(self, start: np.ndarray, beta2: float) -> None:
        import flashoptim_jax as flash
        import jax.numpy as jnp

        self.flash, self.jnp = flash, jnp
        self.rule = flash.flash_adamw(RATE, b2=beta2, weight_decay=0.0, master_weight_bits=24, fused=False)
        self.params = flash.cast_tree_bf16({"w": jnp.array(start)})
        self.state = self.rule.init(self.params)
        size = start.size
        self.moments = (_jax_bytes(self.state.mu) + _jax_bytes(self.state.nu)) / size
        self.all = self.moments + 2 + _jax_bytes(self.state.ecc) / size

    def step(self, gradient: np.ndarray) -> None:
        self.params, self.state = self.rule.step(self.params, self.state, {"w": self.jnp.array(gradient)})

    def weights(self) -> np.ndarray:
        return np.asarray(self.flash.reconstruct_weights(self.params, self.state.ecc)["w"], np.float64)

    def second(self) -> np.ndarray:
        v = self.flash.dequantize_variance(self.state.nu["w"])
        return np.asarray(v, np.float64).reshape(self.params["w"].shape)


def _jax_bytes(tree: Any) -> int:
    import jax

    return sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(tree) if hasattr(leaf, "nbytes"))


PEERS: dict[str, Callable[[np.ndarray, float], Peer]] = {
    "mlx_empire 8-bit, exact master": Ours,
    "mlx_empire 8-bit, diet master": lambda start, beta2: Ours(start, beta2, "diet"),
    "flashoptim-jax, 24-bit master": Flash,
    "bitsandbytes AdamW8bit": bitsandbytes,
    "torchao AdamW8bit": torchao("AdamW8bit"),
    "torchao AdamWFp8": torchao("AdamWFp8"),
    "torchao AdamW4bit": torchao("AdamW4bit"),
    "optimi AdamW, Kahan, bfloat16": kahan,
    "MLX AdamW, bfloat16": lambda start, beta2: Stock(start, beta2, mx.bfloat16),
    "MLX AdamW, float32": lambda start, beta2: Stock(start, beta2, mx.float32),
}


def table(rows: list[Row], beta2: float) -> Table:
    made = Table(title=f"beta2 = {beta2}", title_justify="left")
    made.add_column("optimizer")
    for name in ("m + v bytes", "all bytes", "update", "v bias", "largest", "moved"):
        made.add_column(name, justify="right")
    for row in (r for r in rows if r.beta2 == beta2):
        numbers = (f"{row.moments:.3f}", f"{row.all:.3f}", f"{row.update:.4f}", f"{100 * row.v_bias:+.2f} %")
        made.add_row(row.name, *numbers, f"{row.largest:.2f}", f"{row.moved:.4f}")
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--only", default="", help="the optimizers whose name has this in it")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    gradients = recorded_gradients(options.steps)
    start = np.array(
        mx.array(np.random.default_rng(0).normal(size=gradients.shape[1:]) * 0.02)
        .astype(mx.bfloat16)
        .astype(mx.float32)
    )
    rows, missing = [], {}
    for name, make in ((name, make) for name, make in PEERS.items() if options.only in name):
        for beta2 in (0.999, 0.95):
            try:
                rows.append(measure(name, make(start, beta2), start, gradients, beta2))
                print(rows[-1], file=sys.stderr, flush=True)
            except (ImportError, AttributeError, RuntimeError, NotImplementedError) as error:
                missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    console = Console(width=120)
    for beta2 in (0.999, 0.95):
        console.print(table(rows, beta2))
    for name, reason in missing.items():
        console.print(f"not run: {name}: {reason}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"rows": [asdict(r) for r in rows], "missing": missing}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
