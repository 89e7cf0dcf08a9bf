"""Where the page is served, and what is printed of it: on this machine alone, or in the local network with a token."""

from __future__ import annotations

import errno
import os
import secrets
import socket
import sys
import webbrowser
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import uvicorn

from mlx_empire.errors import UserError
from mlx_empire.open.app import make_app
from mlx_empire.open.command import PORT
from mlx_empire.page.watch import Gallery, full_path, name_in
from mlx_empire.run.names import RUNS
from mlx_empire.run.overview import runs_in

LOOPBACK = "127.0.0.1"
TOKEN_BYTES = 18
LAST_SECONDS = 1  # for open pages, when the server is stopped


def serve_pages(folder: Path, lan: bool, port: int | None, *, browser: bool) -> int:
    """Serve the runs at `folder` until Ctrl-C; 0. UserError where there is no such folder, or the port is taken."""
    root, start = root_of(folder)
    token = secrets.token_urlsafe(TOKEN_BYTES) if lan else None
    hosts = lan_hosts() if lan else []
    with _listening("0.0.0.0" if lan else LOOPBACK, port) as listener:  # noqa: S104  asked for by --lan
        number = listener.getsockname()[1]
        asked = f"?token={token}" if token else ""
        addresses = [f"http://{host}:{number}{start}{asked}" for host in hosts or [LOOPBACK]]
        print(*addresses, sep="\n")
        print("Ctrl-C ends the page, not the run.", flush=True)
        if browser and sys.stdout.isatty() and "SSH_CONNECTION" not in os.environ:
            webbrowser.open(f"http://{LOOPBACK}:{number}{start}{asked}")
        app = make_app(Gallery(root), [LOOPBACK, "localhost", *hosts], token)
        config = uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=LAST_SECONDS, lifespan="off"
        )
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
    return 0


def root_of(folder: Path) -> tuple[Path, str]:
    """The folder whose runs are shown, and the page at which one begins. UserError where there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give that of a run, or one with runs in it")
    folder = full_path(folder)
    if folder not in runs_in(folder):
        return folder, "/"
    around = RUNS.absolute() if RUNS.absolute() in folder.parents else folder.parent
    root = next(one for one in (around, folder.parent, folder) if folder in runs_in(one))
    return root, f"/run/{quote(name_in(root, folder))}"


def lan_hosts() -> list[str]:
    """What this machine is called in the local network: its name, and its address there."""
    name = socket.gethostname()
    found = [name if "." in name else f"{name}.local"]
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(
            ("192.0.2.1", 9)
        )  # an address of no machine; nothing is sent, the system only chooses a way
        found.append(probe.getsockname()[0])
    return [*dict.fromkeys([*found[::-1], name])]


def _listening(host: str, port: int | None) -> socket.socket:
    """A socket that listens at the port that was asked for; without one at PORT, or at a free one."""
    for number in [port] if port is not None else [PORT, 0]:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, number))
            listener.listen()
            return listener
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE or port is not None:
                raise UserError(f"--port {number}: {error.strerror}; choose another one") from None
    raise AssertionError("port 0 is always free")
