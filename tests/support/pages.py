"""What a page of documentation names, and what of it is not there: commands, files, recipe keys, links.

A page's *code* is its code blocks, line by line, and what stands in backticks. `problems` gives a sentence for each
thing that a reader would look for in vain.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from mlx_empire.cli import VERBS
from mlx_empire.recipe.explain import leaf_fields, sections

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mlx_empire"
BLOCK = re.compile(r"^ *```\w*\n(.*?)^ *```$", re.S | re.M)
SPAN = re.compile(r"`((?:[^`\n]|\n(?!\n))+)`")
FOLDERS = "recipes|hosts|benchmarks|tests|docs|mlx_empire"
ENDINGS = "ya?ml|py|txt|svg|png|md|gz|c"
NO_KEYS = ("py", "md", "json", "yaml", "html")  # endings of files that are called as a section is


def code(text: str) -> list[str]:
    """A page's code, in pieces."""
    lines = [line for block in BLOCK.findall(text) for line in block.splitlines()]
    return lines + [" ".join(span.split()) for span in SPAN.findall(BLOCK.sub("", text))]


def problems(page: Path, text: str) -> list[str]:
    """What `text`, which stands at `page`, names and is not there."""
    if len(re.findall(r"^ *```", text, re.M)) % 2:
        return ["a code block is not closed"]
    checks = (_targets, _commands, _imports, _paths, _keys)
    found = [problem for piece in code(text) for check in checks for problem in check(piece)]
    return [*found, *_files(text), *_links(page, text)]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def _targets(piece: str) -> Iterator[str]:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z][\w-]*)", piece):
        if not re.search(rf"^{re.escape(target)}:", makefile, re.M):
            yield f"make {target}: no such target"


def _commands(piece: str) -> Iterator[str]:
    """Modules that cannot be run; subcommands and options that stand nowhere in what is run."""
    named = re.search(r"(?<![\w/.-])(?:\.venv/bin/)?mlx-empire ([a-z][\w-]*)(.*)", piece)
    module = re.search(r"-m (mlx_empire(?:\.[a-z_]+)+)(.*)", piece)
    script = re.search(rf"python ((?:{FOLDERS})/[\w./-]+\.py)(.*)", piece)
    if named:
        verbs = {name: verb for group in VERBS.values() for name, verb in group.items()}
        if named[1] not in verbs:
            yield f"mlx-empire {named[1]}: no such verb"
            return
        source = _text_of(verbs[named[1]].module)
        asked = re.findall(r"--[\w-]+", named[2].partition("#")[0])
    elif module:
        source = _source(module[1])
        if source is None:
            yield f"python -m {module[1]}: cannot be run"
            return
        words = module[2].partition("#")[0].replace("[", " ").replace("]", " ").split()
        asked = [word for word in words if word.startswith("--")]
        asked += [word for word in words[:1] if re.fullmatch("[a-z-]+", word)]
    elif script and (ROOT / script[1]).is_file():
        source = (ROOT / script[1]).read_text()
        asked = re.findall(r"--[\w-]+", script[2])
    elif piece.startswith("--"):
        source = "".join(file.read_text() for file in PACKAGE.rglob("*.py"))
        asked = re.findall(r"--[\w-]+", piece)
    else:
        return
    for word in dict.fromkeys(asked):
        if not any(f'"{name}"' in source for name in (word, word.removeprefix("--"))):
            yield f"{word} in {piece!r}: no such option or subcommand"


def _source(module: str) -> str | None:
    """The text of a module that can be run, of all its files where it is a package; None where it cannot."""
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin)
    if spec.submodule_search_locations:
        runs, files = (file.parent / "__main__.py").is_file(), sorted(file.parent.rglob("*.py"))
    else:
        runs, files = '__name__ == "__main__"' in file.read_text(), [file]
    files.append(PACKAGE / "recipe" / "arguments.py")  # what all verbs with a recipe take
    return "".join(one.read_text() for one in files) if runs else None


def _text_of(module: str) -> str:
    """The text of a verb's module, of all files of its package, and of what all verbs with a recipe take."""
    file = Path(str(import_module(module).__file__))
    files = [file] if file.parent == PACKAGE else sorted(file.parent.rglob("*.py"))
    return "".join(one.read_text() for one in [*files, PACKAGE / "recipe" / "arguments.py"])


def _imports(piece: str) -> Iterator[str]:
    for module, name in re.findall(r"from (mlx_empire[\w.]*) import (\w+)", piece):
        if not hasattr(import_module(module), name):
            yield f"{name}: is not in {module}"


def _paths(piece: str) -> Iterator[str]:
    """Folders of the repository, and files of the package by their folder there, such as plan/schedule.py."""
    if re.fullmatch(rf"(?:{FOLDERS})/(?:[\w-]+/)*", piece) and not (ROOT / piece).is_dir():
        yield f"{piece}: no such folder"
    here = (ROOT / piece).is_file() or (PACKAGE / piece).is_file()
    if re.fullmatch(r"[a-z_]+/\w+\.py", piece) and not here:
        yield f"{piece}: no such file"


def _files(text: str) -> Iterator[str]:
    """Files anywhere in the text by their path from the repository's top, but those in `_paths`."""
    for file in sorted(set(re.findall(rf"(?<![\w./-])((?:{FOLDERS})/[\w./-]+\.(?:{ENDINGS}))\b", text))):
        if not (ROOT / file).is_file() and not re.fullmatch(r"[a-z_]+/\w+\.py", file):
            yield f"{file}: no such file"


def _keys(piece: str) -> Iterator[str]:
    known = leaf_fields()
    for section, key in re.findall(rf"(?<![\w./-])({'|'.join(sections())})\.([a-z_]+)(?![\w.(/])", piece):
        if f"{section}.{key}" not in known and key not in NO_KEYS:
            yield f"{section}.{key}: no such key of a recipe"


def _links(page: Path, text: str) -> Iterator[str]:
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path
        if not target.exists():
            yield f"{link}: leads nowhere"
        elif anchor and anchor not in anchors(target.read_text() if path else text):
            yield f"{link}: no such heading"
