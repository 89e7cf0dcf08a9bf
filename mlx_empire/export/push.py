"""A result as a private repository of the Hugging Face Hub: what goes there, and what of this machine does not.

Weights and tokenizer as they lie in the folder; the model card, the recipe (training_config.yaml), its figures
(training_metrics.json), the software that pushed it (environment.json), and digests of all of it (SHA256SUMS). In texts
a path becomes its last name, a base that came from the Hub its name there; where notices are posted, and on which
hosts it ran, is left out. Nothing is sent before every text was looked through.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, RepoCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from mlx_empire.comm.checks import environment
from mlx_empire.errors import UnreachableError, UserError
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
_PATH = re.compile(r"(?<![\w:/.<>~-])(?:~|/[\w.@+%-]+)(?:/[\w.@+%-]+)+/?")
_RECIPE = re.compile(r"(?s)(## Recipe\n\n```yaml\n).*?(```)")
# Settings in which libraries note where a model came from; the rest of such a file is sent as it is.
_NOTED = ("base_model_name_or_path", "_name_or_path")

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
    strip = _Stripped(recipe, known)
    contents: Contents = {}
    for path in _weights(found):
        name = str(path.relative_to(found.weights))
        contents[name] = _settings(path, strip) if path.name in (CONFIG_NAME, "config.json") else path
    config = strip(dump_recipe(_told(recipe)))
    card, notes = _card(found, known, strip, config)
    contents[CARD_NAME] = card
    contents["training_config.yaml"] = config.encode()
    contents["training_metrics.json"] = strip(json.dumps(read_metrics(found.run), indent=1)).encode()
    contents["environment.json"] = (strip(json.dumps(environment(), indent=1)) + "\n").encode()
    strip.require_clean({n: v.decode() for n, v in contents.items() if isinstance(v, bytes)})
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


def _told(recipe: Recipe) -> Recipe:
    """The recipe without what is this owner's alone."""
    return variant(recipe, {"report.notify": None, "run.hosts": None, "run.checkpoints": None})


class _Stripped:
    """Takes this machine's paths out of texts. `known`: the base's name on the Hub, which its path becomes."""

    def __init__(self, recipe: Recipe, known: str | None) -> None:
        paths = {str(value) for _, section in recipe for _, value in section if isinstance(value, Path)}
        paths |= {
            str(p) for one in recipe.evaluation.sets for p in (one.path, one.json_schema) if p is not None
        }
        self._names = {path: Path(path).name or path for path in paths if "/" in path}
        self._names[str(Path.home())] = "~"
        if known is not None:
            self._names[str(recipe.model.path)] = known

    def __call__(self, text: str) -> str:
        for path in sorted(self._names, key=len, reverse=True):
            text = text.replace(path, self._names[path])
        return _PATH.sub(lambda found: found[0].rstrip("/").rpartition("/")[2], text)

    @staticmethod
    def require_clean(texts: Mapping[str, str]) -> None:
        """UserError for a text in which a path of this machine is left."""
        home = str(Path.home())
        for name, text in texts.items():
            if (len(home) > 1 and home in text) or _PATH.search(text):
                raise UserError(f"{name}: a path of this machine is left in it; nothing was sent")


def _settings(path: Path, strip: _Stripped) -> bytes:
    """A JSON file of settings, of which only what notes a model's place is changed."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    noted = {key: strip(found[key]) for key in _NOTED if isinstance(found.get(key), str)}
    return (json.dumps(found | noted, indent=2, ensure_ascii=False) + "\n").encode()


def _card(found: Finished, known: str | None, strip: _Stripped, config: str) -> tuple[bytes, list[str]]:
    """The model card as the Hub reads it, with the recipe that is sent. UserError where there is none, or it cannot be
    read.
    """
    path = found.weights / CARD_NAME
    if not path.exists():
        raise UserError(f"{path}: the result has no model card, so nobody could tell what it is")
    text, notes = strip(path.read_text(encoding="utf-8")), []
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
    return text.encode(), notes


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
