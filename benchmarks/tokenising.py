"""How fast tokens stream to the cache, and in how much memory: `python benchmarks/tokenising.py`.

A run of `mlx-empire train` on two ranks of this machine, of a tiny model with SmolLM2's tokenizer, reads generated
text; its time is from the command's start until the cache's entry has its name. The peer is the tokenizers library
alone in a process of its own: the same file, `encode_batch` on as many rows at once, as many threads, only these calls
timed. A pair is one after the other, and the order alternates. Memory is the sum over all processes of the run of what
they hold (PSS: a page that n of them share counts as 1/n), looked at all the time (Linux). Then a second run
starts: the bytes that its processes read, beside those of such a run on a few rows, say whether it read the text again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from launching import ROOT, SPEECHES, beside_python, environment

MODEL = ROOT / "models" / "smollm2-135m"
RESULTS = ROOT / "build" / "tokenising.json"
LEAST_RATIO, MOST_PSS, MOST_READ = 0.7, 10**9, 0.1
TOGETHER = 256  # rows, and characters: as `data/encode.py` has them
CHARACTERS = 2**20
RANKS = 2
LOOK_SECONDS = 0.05


@dataclass
class Watched:
    """A command while it runs: the most that all its processes held, and the bytes that each has read."""

    peak: int = 0
    read: dict[int, int] = field(default_factory=dict)

    def look(self, root: int) -> None:
        """Add what is there now; a process that has just ended is left out."""
        total = 0
        for pid in descendants(root):
            try:
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                read = Path(f"/proc/{pid}/io").read_text().split()
            except OSError:
                continue
            total += next(
                (int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("Pss:")), 0
            )
            self.read[pid] = int(read[1])
        self.peak = max(self.peak, total)


@dataclass(frozen=True)
class Measured:
    """Seconds and seconds of processor time, tokens of the text, bytes held at the peak, bytes read."""

    seconds: float
    processor: float
    tokens: int
    peak: int = 0
    read: int = 0


def descendants(root: int) -> list[int]:
    """A process and all that it and its children started."""
    found = [root]
    for pid in found:
        with suppress(OSError):  # it has just ended
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def write_text(file: Path, size: int) -> int:
    """Rows of 50 to 1,500 words, as often as in the speeches, one in forty made up; how many rows."""
    rng, rows, written = np.random.default_rng(7), 0, 0
    words = np.array(
        [w for line in SPEECHES.read_text().splitlines() for w in json.loads(line)["text"].split()]
    )
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    made = np.array(["".join(rng.choice(letters, n)) for n in rng.integers(3, 11, 200_000)])
    with file.open("w") as out:
        while written < size:
            text = rng.choice(words, int(rng.integers(50, 1500)))
            text[:: len(text) // 3 + 1] = [w + "." for w in text[:: len(text) // 3 + 1]]
            row = text.astype(object)
            row[rng.random(len(row)) < 1 / 40] = made[rng.integers(len(made))]
            written += out.write(json.dumps({"text": " ".join(row)}) + "\n")
            rows += 1
    return rows


def run_ours(folder: Path, data: Path, model: Path, name: str, cache: Path) -> Measured:
    """One run with this cache; its recipe, folder and log are called `name`."""
    recipe: dict[str, Any] = {
        "model": {"path": str(model), "init": "random"},
        "data": {"path": str(data), "format": "text", "sequence_length": 128},
        "batch": {"global_size": RANKS},
        "optimizer": {"learning_rate": 1e-4},
        "report": {"progress": "never"},
        "run": {"dir": str(folder / name), "steps": 1, "resume": "never"},
    }
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(recipe))
    mpirun = [beside_python("mpirun"), "--oversubscribe", "-n", str(RANKS)]
    command = [*mpirun, sys.executable, "-u", "-m", "mlx_empire.train", str(file)]
    watched, seconds = Watched(), None
    before, began = processor_seconds(), time.perf_counter()
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command,
            env=environment() | {"MLX_EMPIRE_CACHE": str(cache)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None:
            watched.look(process.pid)
            if seconds is None and entries(cache):
                seconds = time.perf_counter() - began
            time.sleep(LOOK_SECONDS)
    if process.returncode or seconds is None:
        sys.exit(f"benchmarks: {(folder / f'{name}.log').read_text()[-2000:]}")
    (entry,) = entries(cache)
    sizes = {n: len(np.load(entry / f"train.{n}.npy", mmap_mode="r")) for n in ("tokens", "pieces")}
    # A piece's last token is the next one's first.
    tokens = sizes["tokens"] - (sizes["pieces"] - 1)
    return Measured(seconds, processor_seconds() - before, tokens, watched.peak, sum(watched.read.values()))


def entries(cache: Path) -> list[Path]:
    """The cache's entries."""
    return [path for path in (cache / "tokens").glob("*") if not path.name.startswith(".")]


def processor_seconds() -> float:
    """Of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_peer(data: Path, model: Path) -> Measured:
    """`peer` in a process of its own."""
    command = [sys.executable, str(Path(__file__)), "--peer", str(data), "--model", str(model)]
    told = subprocess.run(command, env=environment(), check=True, capture_output=True, text=True)
    return Measured(**json.loads(told.stdout))


def peer(data: Path, model: Path) -> Measured:
    """Only `encode_batch` is timed; rows are read in between."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    seconds = processor = 0.0
    tokens, waiting, characters = 0, list[str](), 0

    def encode() -> None:
        nonlocal seconds, processor, tokens, waiting, characters
        began, used = time.perf_counter(), time.process_time()
        found = tokenizer.encode_batch(waiting, add_special_tokens=False)
        seconds, processor = seconds + time.perf_counter() - began, processor + time.process_time() - used
        tokens += sum(map(len, found))
        waiting, characters = [], 0

    with data.open() as lines:
        for line in lines:
            waiting.append(json.loads(line)["text"])
            characters += len(waiting[-1])
            if len(waiting) == TOGETHER or characters >= CHARACTERS:
                encode()
    if waiting:
        encode()
    return Measured(seconds, processor, tokens)


def tiny_model(folder: Path, tokenizer: Path) -> Path:
    """A Llama of two small layers, with the tokenizer of `tokenizer`."""
    folder.mkdir()
    for file in tokenizer.iterdir():
        if file.suffix in (".json", ".txt", ".jinja") and file.name != "model.safetensors.index.json":
            shutil.copy(file, folder)
    config = json.loads((tokenizer / "config.json").read_text())
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    (folder / "config.json").write_text(
        json.dumps(config | small | {"num_key_value_heads": 1, "head_dim": 32})
    )
    return folder


def main() -> int:
    """Measure, print, write the results; 1 with --check where a target is missed."""
    parser = argparse.ArgumentParser(description="Tokenising beside the tokenizers library alone.")
    parser.add_argument("--megabytes", type=int, default=1000, help="of text")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--model", type=Path, default=MODEL, help="whose tokenizer is used")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go, as JSON")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a target is missed")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        print(json.dumps(asdict(peer(options.peer, options.model))))
        return 0
    if sys.platform != "linux":
        print("tokenising: memory and what is read are looked up in /proc, which Linux alone has; left out")
        return 0
    load, pairs = os.getloadavg()[0], list[tuple[Measured, Measured]]()
    with tempfile.TemporaryDirectory(prefix="bench-tokens-") as name:
        folder, cache = Path(name), Path(name) / "cache"
        model, data = tiny_model(folder / "model", options.model), folder / "train.jsonl"
        rows = write_text(data, options.megabytes * 10**6)
        print(
            f"{options.megabytes} MB in {rows:,} rows; {os.cpu_count()} cores, load {load:.1f} at the start",
            flush=True,
        )
        for number in range(options.pairs):
            shutil.rmtree(cache, ignore_errors=True)
            if number % 2:
                alone = run_peer(data, model)
            ours = run_ours(folder, data, model, f"run{number}", cache)
            if not number % 2:
                alone = run_peer(data, model)
            assert ours.tokens == alone.tokens, (ours.tokens, alone.tokens, rows)
            pairs.append((ours, alone))
            print(sentence(number, options.megabytes, ours, alone), flush=True)
        again = run_ours(folder, data, model, "again", cache)
        few = folder / "few.jsonl"
        with data.open() as lines:
            few.write_text("".join(islice(lines, 20)))
        runs = [
            run_ours(folder, few, model, f"few{n}", folder / "few-cache") for n in (1, 2)
        ]  # the second: from the cache
        read = again.read - runs[1].read
    ratio = float(np.median([alone.seconds / ours.seconds for ours, alone in pairs]))
    peak, share = max(ours.peak for ours, _ in pairs), read / (options.megabytes * 10**6)
    reached = ratio >= LEAST_RATIO and peak <= MOST_PSS and share <= MOST_READ
    print(
        f"ratio {ratio:.3f} (at least {LEAST_RATIO}), peak {peak / 1e6:.0f} MB (at most {MOST_PSS / 1e6:.0f}); started "
        f"again its processes read {read / 1e6:.1f} MB more than those of a run on 20 rows, {share:.1%} of the text; "
        f"load {os.getloadavg()[0]:.1f} at the end: {'ok' if reached else 'MISSED'}"
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    told = {"megabytes": options.megabytes, "load": load, "pairs": [[asdict(o), asdict(a)] for o, a in pairs]}
    options.out.write_text(json.dumps({**told, "again": asdict(again), "reached": reached}, indent=1) + "\n")
    return int(options.check and not reached)


def sentence(number: int, megabytes: int, ours: Measured, alone: Measured) -> str:
    """Both of a pair, and their ratio."""
    return (
        f"pair {number + 1}: {ours.seconds:.1f} s ({megabytes / ours.seconds:.2f} MB/s, {ours.processor:.1f} s of "
        f"processor time for the whole run), encode_batch alone {alone.seconds:.1f} s ({megabytes / alone.seconds:.2f} "
        f"MB/s, {alone.processor:.1f} s); ratio {alone.seconds / ours.seconds:.3f}, peak {ours.peak / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    sys.exit(main())
