"""A result as a private repository of the Hugging Face Hub: what goes there, and what of this machine does not.

Weights and tokenizer as they lie in the folder; the model card, the recipe (training_config.yaml), its figures
(training_metrics.json), the software that pushed it (environment.json), and digests of all of it (SHA256SUMS). In
settings and texts a path becomes a name (`stripped`); where notices are posted, and on which hosts it ran, is left out.
Nothing is sent before every text was looked through.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, RepoCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from mlx_empire.comm.checks import environment
from mlx_empire.errors import UnreachableError, UserError
from mlx_empire.export.stripped import Stripped
from mlx_empire.formats.adapter_folder import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from mlx_empire.formats.fetched import source_of
from mlx_empire.formats.peft import PEFT_NAME, PEFT_WEIGHTS
from mlx_empire.formats.seal import bytes_and_digest, check_sealed, sealed_digest
from mlx_empire.formats.staging import side_files
from mlx_empire.recipe.changes import variant
from mlx_empire.recipe.load import dump_recipe, load_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.recipe.text import one_line
from mlx_empire.report.metrics import read_metrics
from mlx_empire.run.finished import Finished, finished
from mlx_empire.run.names import RECIPE

REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")
_RECIPE = re.compile(r"(?s)(## Recipe\n\n```yaml\n).*?(```)")

Contents = dict[str, Path | bytes]


@dataclass(frozen=True)
class Pushed:
    """What is sent, by its name in the repository, and what there is to say of it."""

    contents: Contents
    notes: list[str]


def push(named: Path, repository: str, *, base: str | None, public: bool) -> list[str]:
    """Send a finished run to the Hub; returns what there is to say. UserError, UnreachableError."""
    for option, value in (("OUT", repository), ("--base", base)):
        if value is not None and not REPOSITORY.fullmatch(value):
            raise UserError(f"{option}: {value}: expected OWNER/NAME, as the Hub has it")
    made = contents_of(finished(named, "FROM"), base)
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    with _in_one_line(repository):
        url = api.create_repo(repository, private=not public, exist_ok=True)
        seen = "private" if api.model_info(repository).private else "public"
    if seen == "public" and not public:
        raise UserError(f"OUT: {repository}: is public already; say --public, or name another repository")
    with _in_one_line(repository):
        operations = [CommitOperationAdd(name, value) for name, value in made.contents.items()]
        api.create_commit(repository, operations, commit_message="mlx-empire export push")
    return [*made.notes, f"{len(made.contents)} files are in {url} ({seen})"]


def contents_of(found: Finished, base: str | None) -> Pushed:
    """What of a finished run is sent. UserError for what no run of ours made, or what is not as it was."""
    if found.run is None:
        raise UserError(
            f"FROM: {found.weights}: no run of this program made it; push it with the Hub's own client"
        )
    digest = sealed_digest(found.weights)
    if digest is not None:
        check_sealed(found.weights, digest)
    recipe = load_recipe(found.run / RECIPE)
    known = base or (source_of(recipe) or "").partition("@")[0] or None
    strip = Stripped(recipe, known)
    contents: Contents = {
        str(path.relative_to(found.weights)): _looked_at(path, strip) for path in _weights(found)
    }
    config = strip(dump_recipe(strip.recipe(_told(recipe))))
    card, notes = _card(found, known, strip, config)
    ours = {
        CARD_NAME: card,
        "training_config.yaml": config,
        "training_metrics.json": strip(json.dumps(read_metrics(found.run), indent=1)),
        "environment.json": strip(json.dumps(environment(), indent=1)) + "\n",
    }
    contents |= {name: text.encode() for name, text in ours.items()}
    for name, value in contents.items():
        if isinstance(value, bytes):
            strip.require_clean(name, value.decode(errors="replace"), ours=name in ours)
    contents["SHA256SUMS"] = "".join(f"{_sha256(v)}  {n}\n" for n, v in sorted(contents.items())).encode()
    return Pushed(contents, notes)


def _weights(found: Finished) -> Iterator[Path]:
    """The files of a result that other tools read."""
    folder = found.weights
    if found.adapter:
        yield from (folder / name for name in (WEIGHTS_NAME, CONFIG_NAME))
        yield from (p for n in (PEFT_WEIGHTS, CONFIG_NAME) if (p := folder / PEFT_NAME / n).exists())
        return
    yield folder / "config.json"
    yield from sorted(folder.glob("model*.safetensors"))
    yield from (p for p in [folder / "model.safetensors.index.json"] if p.exists())
    yield from side_files(folder)


def _looked_at(path: Path, strip: Stripped) -> Path | bytes:
    """A file as it is sent: settings with names for paths, templates to be looked through; vocabulary and weights, in
    which nobody notes a path, as they lie there. UserError.
    """
    if path.name.endswith("config.json"):  # the tokenizer's, for generation ...
        return strip.settings(path)
    return path.read_bytes() if path.suffix == ".jinja" or path.name == "chat_template.json" else path


def _told(recipe: Recipe) -> Recipe:
    """The recipe without what is this owner's alone."""
    return variant(recipe, {"report.notify": None, "run.hosts": None, "run.checkpoints": None})


def _card(found: Finished, known: str | None, strip: Stripped, config: str) -> tuple[str, list[str]]:
    """The model card as the Hub reads it, with the recipe that is sent. UserError where there is none, or it cannot be
    read.
    """
    path = found.weights / CARD_NAME
    if not path.exists():
        raise UserError(f"{path}: the result has no model card, so nobody could tell what it is")
    text, notes = strip.card(path.read_text(encoding="utf-8")), []
    text = _RECIPE.sub(lambda block: f"{block[1]}{config}{block[2]}", text)
    if known is None:  # a folder's name would lead to somebody else's model
        text = re.sub(r"(?m)^base_model(_relation)?:.*\n", "", text, count=2)
        notes.append(
            "the model card names no base, for its folder is not from the Hub: --base OWNER/NAME names it"
        )
    try:
        data = RepoCard(text, ignore_metadata_errors=False).data
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"{path}: its head is not what the Hub reads ({one_line(str(error)[:100])})"
        ) from None
    if known is not None and data.get("base_model") != known:
        raise UserError(f"{path}: base_model is {data.get('base_model')!r:.60}, not {known}; write it there")
    return text, notes


def _sha256(value: Path | bytes) -> str:
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return str(bytes_and_digest(value)["sha256"])


@contextmanager
def _in_one_line(repository: str) -> Iterator[None]:
    """What the Hub's client raises, as an error with its remedy."""
    try:
        yield
    except (HfHubHTTPError, RepositoryNotFoundError) as error:
        status = error.response.status_code
        if status in (401, 403):
            raise UserError(
                f"OUT: {repository}: the Hub lets you not write there ({status}); `hf auth login` with a token that "
                "may write, or name another"
            ) from None
        raise UnreachableError(_cut(repository, error)) from None
    except (HFValidationError, ValueError) as error:
        raise UserError(f"OUT: {repository}: the Hub refuses it ({one_line(str(error)[:160])})") from None
    except (httpx2.HTTPError, OSError) as error:
        raise UnreachableError(_cut(repository, error)) from None


def _cut(repository: str, error: Exception) -> str:
    reason = one_line(" ".join(str(error).split())[:160]) or type(error).__name__
    return f"OUT: {repository}: the Hub was not reached, or not to the end ({reason}); run the same command again"
