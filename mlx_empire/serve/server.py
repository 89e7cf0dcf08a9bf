"""mlx_lm.server's API over one resident base: the `model` of a request is a person's name.

Requests, batches, streams and the prompt cache are mlx_lm.server's; decided here is what a name means. Its batches
hold requests for one model, which it compares by name and adapter: the adapter is named with its version, so one that
was replaced does not join a batch of the old one. Who spoke lately stays in memory: an adapter, and no base.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import OrderedDict
from http.server import ThreadingHTTPServer
from ipaddress import ip_address
from socket import AF_INET6, AI_PASSIVE, SOCK_STREAM, gaierror, getaddrinfo
from threading import Event
from typing import Any

import mlx.core as mx
from mlx_lm.server import APIHandler, LRUPromptCache, ModelProvider, ResponseGenerator

from mlx_empire.comm.connect import choose_device
from mlx_empire.comm.failure import guard
from mlx_empire.errors import EmpireError, UserError
from mlx_empire.run.resident import Resident, speaking_with
from mlx_empire.serve.people import People, UnknownPersonError, Version, people_in

MOST_IN_MEMORY = 64  # adapters that spoke last; one of rank 8 on 8 billion parameters is 84 MB
WAIT_SECONDS = 0.1
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
            raise
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
    """mlx_lm.server's, which refuses what is nobody's name and whatever else would load a model."""

    unknown = False
    adapter: str | None

    @property
    def people(self) -> People:
        """Who can be asked."""
        found: People = self.response_generator.model_provider.people
        return found

    def validate_model_parameters(self) -> None:
        """As there; ValueError also for a name that nobody has. The adapter is that name's, as it is now."""
        super().validate_model_parameters()
        if self.adapter is not None or self.requested_draft_model != "default_model":
            raise ValueError("adapters and draft_model are not taken; name a person in model")
        try:
            self.adapter = self.people.version(self.requested_model).name
        except UnknownPersonError:
            self.unknown = True
            raise

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
        try:
            self.address_family = getaddrinfo(host, port, type=SOCK_STREAM, flags=AI_PASSIVE)[0][0]
            super().__init__((host, port), Handler)
        except (OSError, gaierror) as error:
            raise UserError(
                f"--port: {host}:{port}: {error.strerror}; choose another --port or --host"
            ) from None
        self.generator: ResponseGenerator | None = None

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Hand a connection to the handler."""
        Handler(self.generator, request, client_address, self)

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
        with Server(options.host, options.port) as server:
            serve(server, people, options)
    return 0


def serve(server: Server, people: People, options: argparse.Namespace) -> None:
    """Load the base, say who can be asked, and answer until this process is ended. EmpireError."""
    settings = {"model": str(people.base), "max_tokens": options.max_tokens}
    asked = argparse.Namespace(**SETTINGS, **settings, allowed_origins=options.allowed_origins)
    provider = Provider(people, asked)
    server.generator = generator = ResponseGenerator(provider, LRUPromptCache(SETTINGS["prompt_cache_size"]))
    try:
        while not provider.loaded.wait(WAIT_SECONDS):
            if not generator.generation_available():
                raise EmpireError(f"{people.base}: mlx-lm does not open it: {provider.error[:200]}")
        if not ip_address(str(server.server_address[0])).is_loopback:
            print(
                "WARNING: whoever reaches this machine can ask; nobody is asked for a password",
                file=sys.stderr,
            )
        print(f"serving {', '.join(people.names)} on {server.url} (Ctrl-C ends it)", flush=True)
        server.serve_forever()
    finally:
        generator.stop_and_join()
        mx.clear_cache()
