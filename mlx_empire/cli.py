"""The one command, `mlx-empire VERB ...`: which verbs there are, and in which file the words after one are read.

A verb's file is imported when it is asked for, and imports no mlx and no transformers before it has read its words:
`--help` and a typo are answered at once. Every verb reads them in one order:

    mlx-empire VERB [RECIPE | RUN] [--hosts FILE] [--option ...] [key=value ...]
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import NamedTuple

from mlx_empire import __version__


class Verb(NamedTuple):
    """What a verb is for, in a line; the module whose `main(words)` does it, and words that go before a user's."""

    sentence: str
    module: str
    words: tuple[str, ...] = ()


# By what one wants to do, in the order in which one does it.
VERBS: dict[str, dict[str, Verb]] = {
    "to begin": {
        "init": Verb(
            "the recipes that come with this; one for your model and data", "mlx_empire.init.command"
        ),
        "import": Verb(
            "another trainer's configuration as a recipe, line by line", "mlx_empire.importing.command"
        ),
        "keys": Verb("every key of a recipe: what it decides, its default", "mlx_empire.keys"),
    },
    "before a run": {
        "doctor": Verb(
            "whether machines are ready, and the line that mends what is not", "mlx_empire.doctor.command"
        ),
        "setup": Verb("keys and the same environment on every machine, over ssh", "mlx_empire.setup.command"),
        "fetch": Verb("the model that a recipe names, from the Hugging Face Hub", "mlx_empire.fetch.command"),
        "inspect": Verb(
            "what the model will see of data; other tools' rows as ours", "mlx_empire.inspect.command"
        ),
        "capacity": Verb("what every machine will need, and whether it fits", "mlx_empire.capacity.command"),
        "claims": Verb("the owner's documents' numbers beside ours", "mlx_empire.claims.command"),
        "verify": Verb("what each technique of a recipe changes, pair by pair", "mlx_empire.verify.command"),
    },
    "a run": {
        "train": Verb("train by a recipe, here or under mpirun", "mlx_empire.train.command"),
        "launch": Verb(
            "train over the machines of a hostfile, and go on after failures", "mlx_empire.launch.command"
        ),
        "daughters": Verb("train many adapters on one base", "mlx_empire.daughters.command"),
        "sweep": Verb(
            "adapters by several settings, the best of them to the end", "mlx_empire.daughters.sweep_command"
        ),
        "attach": Verb(
            "the output of a detached run, until it ends", "mlx_empire.launch.command", ("attach",)
        ),
        "stop": Verb("save a launched run, and stop it", "mlx_empire.launch.command", ("stop",)),
    },
    "runs": {
        "list": Verb("the runs in a folder: state, step, losses, size", "mlx_empire.runs.command", ("list",)),
        "status": Verb("how a run goes", "mlx_empire.launch.command", ("status",)),
        "open": Verb("runs as pages in a browser, while they go on", "mlx_empire.open.command"),
        "compare": Verb(
            "what differs between runs, and their figures", "mlx_empire.runs.command", ("compare",)
        ),
        "clean": Verb(
            "what of finished runs can go, and what it frees", "mlx_empire.runs.command", ("clean",)
        ),
    },
    "results": {
        "chat": Verb("let a result answer, alone or beside its base", "mlx_empire.chat.command"),
        "evaluate": Verb("score a result, beside its base or another", "mlx_empire.evaluate.command"),
        "serve": Verb("many adapters of one base by the API of OpenAI", "mlx_empire.serve.command"),
        "export": Verb("merge an adapter, change its format, pack a base", "mlx_empire.export.command"),
    },
}
USAGE = 64  # as `errors.UserError` has it; that module is not needed for this


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print("\n".join(overview()))
        return 0
    if words[0] in ("-V", "--version"):
        print(f"mlx-empire {__version__}")
        return 0
    verbs = {name: verb for group in VERBS.values() for name, verb in group.items()}
    verb = verbs.get(words[0])
    if verb is None:
        near = difflib.get_close_matches(words[0][:60], verbs, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(verbs)}"
        print(f"mlx_empire: {words[0][:60]!r}: no such verb; {hint}", file=sys.stderr)
        return USAGE
    return int(import_module(verb.module).main([*verb.words, *words[1:]]))


def overview() -> Iterator[str]:
    """The lines that tell what there is."""
    yield "usage: mlx-empire VERB [RECIPE | RUN] [--hosts FILE] [key=value ...]"
    for wish, verbs in VERBS.items():
        yield f"\n{wish}"
        yield from (f"  {name:<10} {verb.sentence}" for name, verb in verbs.items())
    yield "\nmlx-empire VERB --help tells the options of a verb. To begin:\n  mlx-empire init"
