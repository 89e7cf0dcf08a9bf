"""mlx_lm.server's API over one resident base: the `model` of a request is a person's name.

Requests, batches, streams and the prompt cache are mlx_lm.server's; decided here is what a name means. Its batches
hold requests for one model, which it compares by name and adapter: the adapter is named with its version, so one that
was replaced does not join a batch of the old one. Who spoke lately stays in memory: an adapter, and no base.

Decided here too is who may ask: no web page but those of --allowed-origins and, where it listens on this machine alone,
nobody by a name that is not this machine's, which a page could have led here (DNS rebinding). Of what was asked nothing
is written anywhere.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from ipaddress import ip_address
from socket import AF_INET6, AI_PASSIVE, SOCK_STREAM, getaddrinfo
from threading import Event
from traceback import extract_tb
from typing import Any
from urllib.parse import urlsplit

import mlx.core as mx
from mlx_lm.server import APIHandler, LRUPromptCache, ModelProvider, ResponseGenerator

from mlx_empire.comm.connect import choose_device
from mlx_empire.comm.failure import guard
from mlx_empire.errors import EmpireError, UserError
from mlx_empire.recipe.text import one_line
from mlx_empire.run.resident import Resident, speaking_with, spelled_here, table_of_positions
from mlx_empire.serve.people import People, UnknownPersonError, Version, people_in

MOST_IN_MEMORY = 64  # adapters that spoke last; one of rank 8 on 8 billion parameters is 84 MB
WAIT_SECONDS = 0.1
MOST_REFUSED = 1 << 20  # bytes of a refused request that are read, so that its sender sees the answer
THIS_MACHINE = ("127.0.0.1", "localhost", "::1")
# What mlx_lm.server reads of its own command line, with its defaults.
SETTINGS: dict[str, Any] = {
    "adapter_path": None,
    "draft_model": None,
    "num_draft_tokens": 3,
    "trust_remote_code": False,
    "chat_template": "",
    "use_default_chat_template": False,
    "chat_template_args": {},
    "temp": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "decode_concurrency": 32,
    "prompt_concurrency": 8,
    "prefill_step_size": 2048,
    "prompt_cache_size": 10,
    "prompt_cache_bytes": None,
    "kv_bits": None,
    "kv_group_size": 64,
    "quantized_kv_start": 5000,
    "pipeline": False,
}


class Provider(ModelProvider):  # type: ignore[misc]
    """Loads the base once, and puts the adapter of whoever is asked for onto it."""

    def __init__(self, people: People, settings: argparse.Namespace) -> None:
        super().__init__(settings)
        self.people = people
        self.loaded, self.error = Event(), ""
        self._base: Resident | None = None
        self._speaking: OrderedDict[str, Resident] = OrderedDict()

    def load_default(self) -> None:
        """The base, in the thread that generates, before the first request."""
        try:
            self._load(str(self.people.base))
        except Exception as error:
            self.error = str(error)
            raise  # it ends this thread; `serve` says why
        self._base = Resident(self.model, self.tokenizer)
        self.loaded.set()

    def load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> Any:
        """(model, tokenizer) of a person, with the adapter of this moment. UnknownPersonError, UserError."""
        version = self.people.version(model_path)
        if version.name not in self._speaking:
            self._speaking[version.name] = self._with(version)
        self._speaking.move_to_end(version.name)
        while len(self._speaking) > MOST_IN_MEMORY:
            self._speaking.popitem(last=False)
        self.model = self._speaking[version.name].model
        self.model_key = (str(self.people.base), version.name, None)
        return self.model, self.tokenizer

    def _with(self, version: Version) -> Resident:
        assert self._base is not None, "the base is loaded first"
        return speaking_with(self._base, version.weights)


class Handler(APIHandler):  # type: ignore[misc]
    """mlx_lm.server's, which refuses who may not ask, what is nobody's name, and whatever else would load a model."""

    unknown = False
    adapter: str | None
    server: Server

    @property
    def people(self) -> People:
        """Who can be asked."""
        found: People = self.response_generator.model_provider.people
        return found

    def parse_request(self) -> bool:
        """As there; a request of one who may not ask is answered by 403, whatever it asks."""
        if not super().parse_request():
            return False
        if (why := self._refusal()) is None:
            return True
        length = self.headers.get("Content-Length", "")
        self.rfile.read(min(int(length), MOST_REFUSED) if length.isdecimal() else 0)
        self._set_completion_headers(403)
        self.end_headers()
        self.wfile.write(json.dumps({"error": why}).encode())
        return False

    def _refusal(self) -> str | None:
        """Why whoever sent this request may not ask; None: may. Who is no browser sends no Origin."""
        allowed, origin = self.response_generator.cli_args.allowed_origins, self.headers.get("Origin")
        if origin is not None and "*" not in allowed and origin not in allowed:
            return f"Origin: {origin[:60]!r}: pages from there may not ask; --allowed-origins names those that may"
        host = self.headers.get("Host")
        if host is not None and self.server.on_loopback and not self.server.is_named(host):
            return f"Host: {host[:60]!r}: not a name of this machine; ask {self.server.url}"
        return None

    def validate_model_parameters(self) -> None:
        """As there; ValueError also for a name that nobody has, and for what would end the thread that generates. The
        adapter is that name's, as it is now.
        """
        super().validate_model_parameters()
        self._validate_texts()
        if self.adapter is not None or self.requested_draft_model != "default_model":
            raise ValueError("adapters and draft_model are not taken; name a person in model")
        try:
            self.adapter = self.people.version(self.requested_model).name
        except UnknownPersonError:
            self.unknown = True
            raise

    def _validate_texts(self) -> None:
        """ValueError for a prompt, messages or stop words of another type than mlx_lm.server reads."""
        stop, messages = self.body.get("stop") or [], self.body.get("messages", [])
        if not isinstance(self.body.get("prompt", ""), str):
            raise ValueError("prompt must be one text")
        if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
            raise ValueError("messages must be a list of objects")
        if not isinstance(stop, str | list) or not all(isinstance(one, str) for one in stop):
            raise ValueError("stop must be a text or a list of texts")

    def _set_completion_headers(self, status_code: int = 200) -> None:
        super()._set_completion_headers(404 if self.unknown else status_code)

    def handle_models_request(self) -> None:
        """The people's names, or of `/v1/models/NAME` that one."""
        _, _, wanted = self.path.partition("/v1/models/")
        names = [name for name in self.people.names if wanted in ("", name)]
        self._set_completion_headers(200 if names or not wanted else 404)
        self.end_headers()
        data = [{"id": name, "object": "model", "created": self.created} for name in names]
        self.wfile.write(json.dumps({"object": "list", "data": data}).encode())
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """Requests are nobody's business but the two who talk."""


class Server(ThreadingHTTPServer):
    """Answers each request in a thread that ends with the process."""

    daemon_threads = True
    request_queue_size = (
        128  # who asks at the same moment; more than socketserver's 5, beyond which they are turned away
    )

    def __init__(self, host: str, port: int) -> None:
        """UserError where nothing can listen there."""
        self._host = host
        try:
            self.address_family = getaddrinfo(host, port, type=SOCK_STREAM, flags=AI_PASSIVE)[0][0]
            super().__init__((host, port), Handler)
        except (OSError, UnicodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "no name that a machine can have"
            raise UserError(f"--port: {host}:{port}: {why}; choose another --port or --host") from None
        self.generator: ResponseGenerator | None = None

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Hand a connection to the handler."""
        Handler(self.generator, request, client_address, self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A line for what went wrong with a request, without what it says; a client that hung up is no error."""
        kind, error, trace = sys.exc_info()
        if kind is not None and not isinstance(error, ConnectionError):
            where = extract_tb(trace)[-1]
            print(
                f"a request could not be answered: {kind.__name__} in {where.name}, {where.filename}:{where.lineno}",
                file=sys.stderr,
            )

    def service_actions(self) -> None:
        """Every half second: EmpireError once the thread that generates has ended, for nobody would be answered."""
        if self.generator is not None and not self.generator.generation_available():
            raise EmpireError("the thread that generates has ended by an error; begin this command again")

    @property
    def on_loopback(self) -> bool:
        """Whether it listens on this machine alone."""
        return ip_address(str(self.server_address[0])).is_loopback

    def is_named(self, host: str) -> bool:
        """Whether a request's `Host` is a name of this machine, or what --host says."""
        try:
            return urlsplit(f"//{host}").hostname in (*THIS_MACHINE, self._host.lower())
        except ValueError:
            return False

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.server_address[:2]
        return (
            f"http://[{host!s}]:{port}/v1"
            if self.address_family == AF_INET6
            else f"http://{host!s}:{port}/v1"
        )


def serve_command(options: argparse.Namespace) -> int:
    """What the command line asks for; returns the exit code."""
    with guard(None):
        choose_device()
        people = people_in(options.people, options.model)
        if positions := table_of_positions(people.base):
            raise UserError(
                f"{people.base}: its table of positions has {positions} rows, and mlx_lm.server lets answers go beyond "
                f"it, which ends the process; ask it by mlx-empire chat"
            )
        if spelled_here(people.base) is not None:
            raise UserError(
                f"{people.base}: its family is mlx_empire's own, and mlx_lm.server reads config.json by itself, where "
                "transformers writes other keys; ask it by mlx-empire chat"
            )
        with Server(options.host, options.port) as server:
            serve(server, people, options)
    return 0


def serve(server: Server, people: People, options: argparse.Namespace) -> None:
    """Load the base, say who can be asked, and answer until this process is ended. EmpireError."""
    settings = {"model": str(people.base), "max_tokens": options.max_tokens}
    asked = argparse.Namespace(**SETTINGS, **settings, allowed_origins=options.allowed_origins)
    provider = Provider(people, asked)
    with _unheard(provider):
        generator = ResponseGenerator(provider, LRUPromptCache(SETTINGS["prompt_cache_size"]))
        server.generator = generator
        try:
            while not provider.loaded.wait(WAIT_SECONDS):
                if not generator.generation_available():
                    why = one_line(provider.error[:200])
                    raise EmpireError(f"{people.base}: mlx-lm does not open it: {why}")
            if not server.on_loopback:
                print(
                    "WARNING: whoever reaches this machine can ask; nobody is asked for a password",
                    file=sys.stderr,
                )
            print(f"serving {', '.join(people.names)} on {server.url} (Ctrl-C ends it)", flush=True)
            server.serve_forever()
        finally:
            generator.stop_and_join()
            mx.clear_cache()


@contextmanager
def _unheard(provider: Provider) -> Iterator[None]:
    """Meanwhile what mlx_lm.server logs is dropped, for it has prompts in it; errors that end its thread are not, but
    that of a base which does not load is said by `serve`.
    """

    def wanted(record: logging.LogRecord) -> bool:
        if record.pathname == sys.modules[APIHandler.__module__].__file__:
            return record.exc_info is not None and not provider.error
        return True

    logging.getLogger().addFilter(wanted)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(wanted)
