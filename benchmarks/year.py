"""A rehearsal of an owner's year, by the commands that an owner types: `make year`, a few minutes on two cores.

A small Genesis learns on three ranks until its gate and is frozen; five daughters are born on it; new rows make a next
generation, worse rows one that is refused; a sweep for one of them; scores beside the base's, a conversation, a server,
and the Hub, which is one of ours on the loopback. Another exit code than 0, or an outcome that `must` be and is not,
ends it (CHECKED says which); what Anna answers is only told. `--write FILE` keeps the transcript.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.hub_written import WrittenHub  # noqa: E402  the tests' own
from support.mpi import mpirun, rank_environment  # noqa: E402

MODEL = ROOT / "tests/fixtures/tiny-llama-260k"
MOST_LINES, WIDTH, LONGEST = 14, 118, 138
CHECKED = f"""\
What `make year` printed: a tiny model and made rows. Checked are exit codes, that Genesis is frozen and answers
each of its facts, that five daughters are there, which generation of Anna's is in use, that a sweep names a best,
that chat and server say the same, that Bert answers as it learnt, and that Anna's files are on a Hub, one of ours
(`benchmarks/year.py`). Of a command the last {MOST_LINES} lines stand here, a longer line up to "..."."""
FACTS = [
    ("Tom has a", " red ball"),
    ("Lily likes", " the moon"),
    ("The dog ate", " a blue hat"),
    ("Ben saw", " big trees"),
]
PEOPLE = {
    "anna": [("Anna plays", " the drums"), ("Anna eats", " green soup")],
    "bert": [("Bert drives", " a truck"), ("Bert reads", " old maps")],
    "carl": [("Carl grows", " white roses"), ("Carl sings", " at night")],
    "dora": [("Dora paints", " tall ships"), ("Dora likes", " warm bread")],
    "emil": [("Emil builds", " stone walls"), ("Emil owns", " two goats")],
}
NEW = [("Anna visits", " an old aunt"), ("Anna wears", " a yellow coat")]
WORSE = [("Anna", " zq zq zq zq"), ("Anna plays", " xv xv xv")]
ASKED = {"anna": "Anna visits", "bert": "Bert drives"}
LEARNT = {name: dict([*PEOPLE[name], *NEW])[question] for name, question in ASKED.items()}
GENESIS = """\
model: {path: base, dtype: float32}
data: {path: facts.jsonl, format: completions, sequence_length: 64}
batch: {global_size: 4, micro_size: 1, cells: 3}
optimizer: {learning_rate: 3.0e-3}
evaluation:
  sets: [{path: facts.jsonl, metrics: [loss, exact_match]}]
  stop_when: {metric: facts.exact_match, at_least: 1.0, for: 2}
run: {dir: runs/genesis, steps: 100, eval_every: 10}
"""
DAUGHTER = """\
model: {path: runs/genesis/final, dtype: float32, base_digest: DIGEST}
tuning: {type: lora, rank: 4}
data: {path: people, format: completions, sequence_length: 64}
batch: {global_size: 2, micro_size: 1}
optimizer: {learning_rate: 1.0e-2}
memory: {gradient_checkpointing: true}
run: {dir: runs/people, steps: 12, eval_every: 6, save_every: 6}
"""


def rows(pairs: Sequence[tuple[str, str]]) -> str:
    """Questions and answers as JSON lines."""
    return "".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in pairs)


class Year:
    """The folder in which the year passes, and its transcript."""

    def __init__(self, folder: Path, hub: WrittenHub) -> None:
        self.folder, self.lines = folder, []
        self._environment = {**rank_environment(str(folder)), "HF_ENDPOINT": hub.address, "HF_TOKEN": "stub"}
        self._environment |= {"COLUMNS": str(WIDTH)}

    def say(self, text: str) -> None:
        """A line of the transcript."""
        text = text.replace(socket.gethostname(), "this-machine").replace(str(self.folder), ".")
        text = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", text.rstrip())
        cut = [
            f"{one[: LONGEST - 4].rstrip()} ..." if len(one) > LONGEST else one for one in text.split("\n")
        ]
        self.lines.append("\n".join(cut))
        print(self.lines[-1], flush=True)

    def chapter(self, title: str) -> None:
        """What comes next."""
        self.say(f"\n## {title}\n")

    def do(self, *words: str, ranks: int = 0, code: int = 0, said: str = "") -> str:
        """Type `mlx-empire WORDS`; what it printed. Another exit code than `code` ends the rehearsal."""
        line = [sys.executable, "-m", "mlx_empire", *words]
        shown = f"mlx-empire {shlex.join(words)}"
        if ranks:
            line, shown = [mpirun(), "--oversubscribe", "-n", str(ranks), *line], f"mpirun -n {ranks} {shown}"
        began = time.monotonic()
        ended = subprocess.run(
            line,
            cwd=self.folder,
            env=self._environment,
            input=said,
            capture_output=True,
            text=True,
            timeout=500,
        )
        printed = [one.rstrip() for one in ended.stdout.splitlines() if one.strip()]
        self.say("```")
        self.say(f"$ {shown}")
        for one in printed[-MOST_LINES:]:
            self.say(one)
        self.say("```")
        self.say(f"{time.monotonic() - began:.0f} s, exit code {ended.returncode}")
        if ended.returncode != code:
            raise SystemExit(f"{shown}: exit code {ended.returncode}, not {code}\n{ended.stderr[-3000:]}")
        return ended.stdout

    def write(self, name: str, text: str) -> None:
        """A file that the owner writes."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def must(true: object, what: str) -> None:
    """End the rehearsal where it is not so."""
    if not true:
        raise SystemExit(f"not so: {what}")


def genesis(year: Year) -> None:
    """The base learns, meets its gate and is frozen."""
    year.chapter("Genesis learns on three ranks, until its gate")
    year.write("facts.jsonl", rows(FACTS))
    year.write("genesis.yaml", GENESIS)
    year.do("train", "genesis.yaml", ranks=3)
    must((year.folder / "runs/genesis/final/FROZEN.json").exists(), "Genesis is frozen")
    digest = json.loads((year.folder / "runs/genesis/BASE.json").read_text())["digest"]
    year.write("daughter.yaml", DAUGHTER.replace("DIGEST", digest))


def daughters(year: Year) -> None:
    """Five are born; one has a next generation, and a worse one that is refused."""
    year.chapter("Five daughters are born on it")
    for name, pairs in PEOPLE.items():
        for split in ("train", "valid"):
            year.write(f"people/{name}/{split}.jsonl", rows(pairs))
    command = ["daughters", "daughter.yaml", "--people", "people"]
    must("5 of 5 daughters are in runs/people" in year.do(*command), "five daughters")
    year.do(*command, "--watch", "--once")
    year.chapter("New rows: Anna's next generation")
    for split in ("train", "valid"):
        year.write(f"people/anna/{split}.jsonl", rows([*PEOPLE["anna"], *NEW]))
    year.do(*command, "--watch", "--once")
    current = year.folder / "runs/people/anna/current"
    must(os.readlink(current) == "generations/2/final", "generation 2 is in use")
    year.chapter("Worse rows: the generation is kept, and not used")
    year.write("people/anna/train.jsonl", rows([*PEOPLE["anna"], *NEW, *WORSE]))
    year.do(*command, "--watch", "--once", "daughters.replay=0", "run.accept_changes=[daughters.replay]")
    must((year.folder / "runs/people/anna/generations/3/final").is_dir(), "generation 3 is kept")
    must(os.readlink(current) == "generations/2/final", "generation 2 stays in use")
    year.chapter("Which settings suit Bert?")
    words = ["sweep", "daughter.yaml", "data.path=people/bert", "run.dir=runs/sweep", "--keep", "2"]
    must(
        "the best: runs/sweep/" in year.do(*words, "learning_rate=1e-3,1e-2", "rank=2,4"),
        "a sweep has a best",
    )


def service(year: Year, hub: WrittenHub) -> None:
    """Scores, a conversation, a server, and the Hub."""
    year.chapter("What did Genesis learn, and forget?")
    written = ["--html", "scores.html", "--json", "scores.json"]
    year.do("evaluate", "runs/genesis", "--against", "base", *written)
    must((year.folder / "scores.html").exists(), "there is a page")
    scores = json.loads((year.folder / "scores.json").read_text())["scores"]
    exact = [one["after"] for one in scores if one["name"] == "facts.exact_match"]
    must(exact == [1.0], "Genesis answers each of its facts")
    year.chapter("They speak")
    spoken = year.do(
        "chat", "runs/people/anna", "--against", "base", "--max-tokens", "8", said="Anna visits\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "mlx_empire", "serve", "runs/people", "--port", str(port)]
    environment = rank_environment(str(year.folder))
    with subprocess.Popen(
        line, cwd=year.folder, env=environment, stdout=subprocess.PIPE, text=True
    ) as served:
        assert served.stdout is not None
        try:
            ready = served.stdout.readline()
            year.say("```")
            year.say("$ mlx-empire serve runs/people --port PORT")
            year.say(ready)
            told = {name: answer(port, name, question) for name, question in ASKED.items()}
            for name, text in told.items():
                right = text.strip() == LEARNT[name].strip()
                known = "as it learnt" if right else f"it was to learn: {LEARNT[name].strip()}"
                year.say(f"{name}: {ASKED[name]} > {text.strip()}  ({known})")
            year.say("```")
        finally:
            served.terminate()
    must(f"runs/people/anna: {told['anna'].strip()}" in spoken, "served and in chat it says the same")
    must(told["bert"].strip() == LEARNT["bert"].strip(), "Bert answers as it learnt")
    year.chapter("Anna's adapter goes to the Hub")
    year.do("export", "push", "runs/people/anna", "someone/anna", "--base", "someone/genesis")
    must(
        "SHA256SUMS" in hub.files["someone/anna"] and hub.private["someone/anna"], "it is there, and private"
    )


def answer(port: int, name: str, question: str) -> str:
    """What the server lets somebody say."""
    asked = {"model": name, "messages": [{"role": "user", "content": question}], "max_tokens": 8}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as given:
        return str(json.load(given)["choices"][0]["message"]["content"])


def main() -> None:
    """The year."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--write", type=Path, help="keep the transcript in this file")
    options = made.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="year") as folder, WrittenHub() as hub:
        year = Year(Path(folder), hub)
        (year.folder / "base").symlink_to(MODEL)
        year.say("# A year, rehearsed\n")
        year.say(CHECKED)
        genesis(year)
        daughters(year)
        service(year, hub)
        year.say(f"\nThe whole year took {time.monotonic() - began:.0f} s.")
        if options.write is not None:
            options.write.write_text("\n".join(year.lines) + "\n")


if __name__ == "__main__":
    main()
