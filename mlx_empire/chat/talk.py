"""A conversation with a finished result, and beside it with another one: mlx-lm's generation, token by token.

Two answers are written in turn, a token each, into two columns; each side remembers its own answers. Where nobody sits
at a terminal, every line is a question without what came before, and answers come one after the other, each after the
name of who gives it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.sample_utils import make_sampler
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mlx_empire.chat.command import BASE
from mlx_empire.checkpoint.manifest import sampled_digest
from mlx_empire.comm.connect import choose_device
from mlx_empire.comm.failure import guard
from mlx_empire.errors import UserError
from mlx_empire.run.finished import Finished, finished
from mlx_empire.run.resident import Resident, base_folder_of, load_model, speaking_with

Message = Mapping[str, str]


@dataclass
class Speaker:
    """One side: its name, its model, and what was said."""

    name: str
    resident: Resident
    said: list[Message] = field(default_factory=list)

    def answers(self, question: str, options: argparse.Namespace) -> Iterator[str]:
        """An answer, piece by piece; it is remembered with the question once it is whole."""
        messages = [*self.said, {"role": "user", "content": question}]
        prompt = prompt_of(self.resident.tokenizer, messages)
        mx.random.seed(options.seed)
        pieces: list[str] = []
        for response in stream_generate(
            self.resident.model,
            self.resident.tokenizer,
            prompt,
            max_tokens=self.resident.tokens_behind(prompt, options.max_tokens),
            sampler=make_sampler(temp=options.temp, top_p=options.top_p),
        ):
            pieces.append(response.text)
            yield response.text
        self.said = [*messages, {"role": "assistant", "content": "".join(pieces)}]


def prompt_of(tokenizer: Any, messages: Sequence[Message]) -> Any:
    """What mlx_lm.generate makes of a prompt: by the chat template where there is one, else the text as it stands."""
    if tokenizer.has_chat_template:
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)
    return "\n".join(message["content"] for message in messages)


def chat_command(options: argparse.Namespace) -> int:
    """What the command line asks for; returns the exit code."""
    with guard(None):
        choose_device()
        speakers = speakers_of(options)
        for speaker in speakers if options.system else ():
            speaker.said.append({"role": "system", "content": options.system})
        if sys.stdin.isatty() and sys.stdout.isatty():
            converse(speakers, options, Console())
        else:
            answer_lines(speakers, options)
    return 0


def speakers_of(options: argparse.Namespace) -> list[Speaker]:
    """Those who answer: the result, after what it is compared with. A base of both is read once. UserError."""
    bases: dict[Path, tuple[Resident, str]] = {}

    def base(folder: Path) -> tuple[Resident, str]:
        where = folder.resolve()
        if where not in bases:
            bases[where] = load_model(folder), sampled_digest(folder)
        return bases[where]

    def speaker(named: Path, found: Finished, key: str) -> Speaker:
        if not found.adapter:
            return Speaker(str(named), base(found.weights)[0])
        folder = base_folder_of(found, options.model, key)
        resident, digest = base(folder)
        if not found.speaks_on(folder, digest, named=options.model is not None):
            raise UserError(
                f"{key}: {named}: was trained on other weights than those in {folder}; name its base by --model FOLDER"
            )
        return Speaker(str(named), speaking_with(resident, found.weights))

    found = finished(options.run, "RUN")
    others = []
    if options.against == BASE:
        others = [Speaker(BASE, base(base_folder_of(found, options.model, "--against"))[0])]
    elif options.against is not None:
        named = Path(options.against)
        others = [speaker(named, finished(named, "--against"), "--against")]
    return [*others, speaker(options.run, found, "RUN")]


def answer_lines(speakers: Sequence[Speaker], options: argparse.Namespace) -> None:
    """Every line of the input is a question of its own."""
    before = [list(speaker.said) for speaker in speakers]
    for line in sys.stdin:
        if not (question := line.strip()):
            continue
        print(f"> {question}", flush=True)
        for speaker, said in zip(speakers, before, strict=True):
            speaker.said = list(said)
            print(f"{speaker.name}: ", end="", flush=True)
            for piece in speaker.answers(question, options):
                print(piece, end="", flush=True)
            print(flush=True)


def converse(speakers: Sequence[Speaker], options: argparse.Namespace, console: Console) -> None:
    """Ask a person at a terminal, until the end of input."""
    while True:
        try:
            question = console.input("> ").strip()
        except EOFError:
            return
        if question:
            side_by_side(speakers, question, options, console)


def side_by_side(
    speakers: Sequence[Speaker], question: str, options: argparse.Namespace, console: Console
) -> None:
    """Write the answers beside one another while they grow, a token each in turn: as much as the terminal has room for,
    and in the end all.
    """
    texts = [Text() for _ in speakers]
    table = Table(box=None, expand=True, padding=(0, 2, 0, 0), show_header=len(speakers) > 1)
    for speaker in speakers:
        table.add_column(Text(speaker.name), ratio=1, header_style="dim")
    table.add_row(*texts)
    with Live(table, console=console, vertical_overflow="crop"):  # its last frame is whole
        for i, piece in in_turn([speaker.answers(question, options) for speaker in speakers]):
            texts[i].append(piece)


def in_turn(answers: Sequence[Iterator[str]]) -> Iterator[tuple[int, str]]:
    """Pieces of several answers with the number of each, one of each in turn. MLX has one state of random numbers: each
    answer goes on from its own, so it is sampled as if it were alone.
    """
    growing, states, drawing = dict(enumerate(answers)), {}, 0
    while growing:
        for i, answer in list(growing.items()):
            if i != drawing:
                states[drawing], drawing = _random_state(), i
                mx.random.seed(states.get(i, 0))  # an answer that begins seeds it itself
            if (piece := next(answer, None)) is None:
                del growing[i]
            else:
                yield i, piece


def _random_state() -> int:
    """The seed with which MLX would draw what it is about to draw: a key is the two halves of its seed."""
    state: Any = mx.random.state
    high, low = state[0].tolist()
    return int(high) << 32 | int(low)
