"""What the package's code may not do, whatever the input: found by reading every file's syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "mlx_empire"
FILES = sorted(PACKAGE.rglob("*.py"))

FORBIDDEN_MODULES = {
    *(
        "pickle",
        "cPickle",
        "_pickle",
        "dill",
        "cloudpickle",
        "joblib",
        "shelve",
        "marshal",
        "jsonpickle",
    ),  # unpickle
    *("code", "codeop", "runpy", "imp"),  # run code
    *(
        "socketserver",
        "http.server",
        "xmlrpc",
        "asyncio",
        "multiprocessing",
    ),  # listen, or unpickle what comes
    *("urllib.request", "http.client", "requests", "httpx", "ftplib", "telnetlib"),  # call out
}
# Who may call out or listen, and by what: notices go where the recipe says, and nowhere else; `serve` is asked to. A
# scorer is a person's own code, and is run as that. A table names the key of another trainer that is not followed.
ALLOWED = {
    "evaluation/scorer.py": {"calls compile", "calls exec"},
    "importing/rules.py": {"'trust_remote_code': _code"},
    "launch/notices.py": {"imports urllib.request"},
    "serve/server.py": {"imports http.server", "imports http.server.ThreadingHTTPServer"},
}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "execfile"}
FORBIDDEN_CALLS = {
    *("os.system", "os.popen", "os.startfile", "commands.getoutput", "subprocess.getoutput"),
    *("subprocess.getstatusoutput", "torch.load", "np.loads", "numpy.loads", "tempfile.mktemp", "mlx.load"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all", "yaml.full_load_all"),
}
YAML_LOADERS = {"yaml.load", "yaml.parse", "yaml.compose", "yaml.scan"}
SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader"}
# mpi4py's lowercase methods pickle what they send.
PICKLING = {
    *(
        "send",
        "recv",
        "isend",
        "irecv",
        "ssend",
        "bsend",
        "sendrecv",
        "bcast",
        "gather",
        "scatter",
        "allgather",
    ),
    *("reduce", "allreduce", "alltoall", "scan", "exscan", "ibcast"),
}
COMMUNICATORS = ("_communicator", "communicator", "_world", "world", "COMM_WORLD")


def sins(source: str) -> Iterator[str]:
    """What a file does that it may not."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            module = getattr(node, "module", None)
            dotted = names if module is None else [module, *(f"{module}.{name}" for name in names)]
            yield from (f"imports {name}" for name in dotted if covered(name))
        elif isinstance(node, ast.Call):
            yield from sins_of_call(node)
        elif isinstance(node, ast.Dict):
            pairs = [
                (ast.unparse(k), ast.unparse(v)) for k, v in zip(node.keys, node.values, strict=True) if k
            ]
            yield from (f"{k}: {v}" for k, v in pairs if k == "'trust_remote_code'" and v != "False")


def covered(name: str) -> bool:
    """Whether a module or something in it is forbidden."""
    return any(name == bad or name.startswith(bad + ".") for bad in FORBIDDEN_MODULES)


def sins_of_call(node: ast.Call) -> Iterator[str]:
    called = ast.unparse(node.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if isinstance(node.func, ast.Name) and called in FORBIDDEN_NAMES:
        yield f"calls {called}"
    if called in FORBIDDEN_CALLS:
        yield f"calls {called}"
    if called == "__import__" and not (node.args and isinstance(node.args[0], ast.Name)):
        yield "imports by a computed name"
    if called in YAML_LOADERS:
        loader = keywords.get("Loader") or (ast.unparse(node.args[1]) if len(node.args) > 1 else "none")
        if loader not in SAFE_LOADERS:
            yield f"{called} with loader {loader}"
    if keywords.get("shell", "False") != "False":
        yield f"{called} through a shell"
    if keywords.get("trust_remote_code", "False") != "False":
        yield f"{called} with remote code"
    if keywords.get("allow_pickle", "False") != "False":
        yield f"{called} with pickles"
    if called in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False":
        yield f"{called} without allow_pickle=False"
    if isinstance(node.func, ast.Attribute):
        owner = ast.unparse(node.func.value).rpartition(".")[2]
        if owner in COMMUNICATORS and node.func.attr in PICKLING:
            yield f"{called} pickles"
        if node.func.attr in ("bind", "listen") and "sock" in owner:
            yield f"{called} listens"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_the_code_stays_within_bounds(file: Path) -> None:
    assert set(sins(file.read_text())) == ALLOWED.get(file.relative_to(PACKAGE).as_posix(), set())


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "from http.server import HTTPServer",
        "import urllib.request",
        "eval('1')",
        "exec(text)",
        "compile(text, 'x', 'exec')",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=flag)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.load(text, yaml.FullLoader)",
        "yaml.unsafe_load(text)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "load(path, trust_remote_code=True)",
        "load(path, tokenizer_config={'trust_remote_code': True})",
        "self._communicator.send(value, 1)",
        "MPI.COMM_WORLD.bcast(value)",
        "__import__(a + b)",
        "my_socket.bind(('', 80))",
        "torch.load(file)",
    ],
)
def test_the_reader_sees_what_it_should(source: str) -> None:
    assert len(list(sins(source))) >= 1


def test_the_reader_lets_good_code_pass() -> None:
    good = """
yaml.parse(text, Loader=yaml.SafeLoader)
np.load(path, allow_pickle=False)
re.compile('x')
model.eval()
mx.eval(array)
self._communicator.Isend([data, MPI.BYTE], 1, 2)
self._heart.send(message)
subprocess.run(['ls'], shell=False)
load(path, tokenizer_config={'trust_remote_code': False})
"""
    assert list(sins(good)) == []
