"""A tap on the shoulder: what the owner is told of a run while they are elsewhere, and how it gets there.

Ranks say what happened (`progress.tell_notice`), the launcher adds what it sees itself, and sends: it survives the
ranks. One POST serves everybody: JSON with the sentence under the names that Slack (`text`), Discord (`content`) and
Home Assistant's automations (`message`, `event` ...) look for, and headers by which ntfy (2.10 or newer) takes title
and message from it. A Mac shows a notice of its own, too. Nothing here fails a run or holds it up: notices wait in a
queue for a thread, each has five seconds, and what was not sent is said in a line without the address.
"""

from __future__ import annotations

import json
import queue
import shutil
import socket
import string
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.message import Message
from typing import IO, Self

from mlx_empire.errors import UserError
from mlx_empire.launch.ending import MAIN_THREAD, Events
from mlx_empire.progress import stalled_after
from mlx_empire.recipe.notices import Notify
from mlx_empire.report.text import duration

TIMEOUT_SECONDS = 5.0
LONGEST_SENTENCE = 1500  # Discord refuses 2,000 characters
URGENT = ("failure", "stalled", "disk")

# Only in a step's own phases: what else takes long (a first evaluation, loading) has nothing to be compared with, and
# the ranks' deadlines watch it.
_STEP_PHASES = ("data", "forward", "backward", "collectives", "optimizer")


def address(asked: Notify, environment: Mapping[str, str]) -> str | None:
    """Where notices go, with environment variables in place. UserError, without their values, where that is nothing."""
    if asked.url is None:
        return None
    try:
        url = string.Template(asked.url).substitute(environment)
    except KeyError as error:
        raise UserError(
            f"report.notify: {asked.url}: the environment has no {error.args[0]}; export it, or leave "
            "report.notify out"
        ) from None
    if not url.startswith(("http://", "https://")) or any(ch <= " " or ch > "~" for ch in url):
        raise UserError(
            f"report.notify: {asked.url}: what the environment gives is no http or https address; correct it"
        )
    return url


class Notifier:
    """Sends notices of one run; use as a context manager, which waits at its end for those on their way.

    `say`: tells the user in a line; `title`: the run's name. Without `asked` nothing is sent.
    """

    def __init__(
        self, asked: Notify | None, environment: Mapping[str, str], title: str, say: Callable[[str], None]
    ) -> None:
        self._url = None if asked is None else address(asked, environment)
        self._kinds = () if asked is None else asked.on
        self._title, self._say = title, say
        self._queue: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="notices", daemon=True)

    def send(self, kind: str, sentence: str) -> None:
        """Put a notice on its way, if it is of a kind that was asked for; returns at once."""
        if kind in self._kinds:
            self._queue.put((kind, sentence))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._queue.put(None)
        self._thread.join(2 * TIMEOUT_SECONDS)

    def _work(self) -> None:
        while (notice := self._queue.get()) is not None:
            kind, sentence = notice
            title = f"{self._title}: {kind}"
            short = (
                sentence if len(sentence) <= LONGEST_SENTENCE else sentence[: LONGEST_SENTENCE - 3] + "..."
            )
            if self._url is not None:
                why = post(self._url, kind, title, short)
                if why:
                    self._say(f"report.notify: the notice of {kind} was not sent: {why}")
            on_this_mac(title, short)


class _Stay(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as a GET without its body."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Message,
        newurl: str,
    ) -> None:
        return None


def post(url: str, kind: str, title: str, sentence: str) -> str:
    """One POST; why it failed, without the address, or nothing."""
    body = {
        "event": kind,
        "title": title,
        "host": socket.gethostname(),
        "time": time.time(),
        "message": sentence,
        "text": f"{title}: {sentence}",
        "content": f"{title}: {sentence}",
        "allowed_mentions": {"parse": []},  # Discord: a name such as @everyone in a sentence calls nobody
    }
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "mlx_empire",
        "Template": "yes",
        "Title": "{{.title}}",
        "Message": "{{.message}}",
        "Priority": "high" if kind in URGENT else "default",
    }
    try:
        # `address` lets http and https through alone.
        request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")  # noqa: S310
        with urllib.request.build_opener(_Stay).open(request, timeout=TIMEOUT_SECONDS):
            return ""
    except urllib.error.HTTPError as error:
        return f"the server answered {error.code}"
    except urllib.error.URLError as error:
        reason = error.reason
        return (reason.strerror or type(reason).__name__) if isinstance(reason, OSError) else "no connection"
    except Exception as error:  # whatever a server says: it must not end the thread, and so the later notices
        return "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__


def on_this_mac(title: str, sentence: str) -> None:
    """A notice in the corner of a Mac's screen; nothing elsewhere. Words are arguments, never a part of the script."""
    script = "on run argv\ndisplay notification (item 2 of argv) with title (item 1 of argv)\nend run"
    if sys.platform != "darwin" or shutil.which("osascript") is None:
        return
    command = ["osascript", "-e", script, title, sentence]
    try:
        subprocess.run(command, capture_output=True, timeout=TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return


@dataclass
class StallWatch:
    """Notices that steps have stopped coming: once a stall. Times in seconds of one clock."""

    step: int = 0
    since: float = 0.0  # when this step began, or what is no step's own phase
    longest: float = 0.0
    told: bool = False
    inside: bool = False  # a step's own phases

    def stalled(self, events: Events, now: float) -> str | None:
        """The sentence on a stall that begins to count as one, else None."""
        phase, _ = events.places.get(0, {}).get(MAIN_THREAD, ("", 0))
        inside = phase in _STEP_PHASES
        if events.step != self.step or not inside:
            if self.step and self.inside:
                self.longest = max(self.longest, now - self.since)
            self.step, self.since, self.told, self.inside = events.step, now, False, inside
            return None
        self.inside = True
        waited = now - self.since
        if self.told or not self.longest or waited < stalled_after(self.longest):
            return None
        self.told = True
        where = "; ".join(
            f"rank {rank} in {place[0]}" for rank in sorted(events.places) if (place := events.place_of(rank))
        )
        return (
            f"step {self.step} goes on for {duration(waited)}, the longest before took {duration(self.longest)} "
            f"({where})"
        )
